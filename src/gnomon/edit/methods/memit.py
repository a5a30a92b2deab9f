"""MEMIT: many facts at once, spread over several layers (arXiv 2210.07229), and its relatives PMET and RECT, PRUNE.

For every fact a target is searched for the output of the highest edited layer. Layer by layer, lowest first, the keys
are read in the partly edited model, the rest still missing is measured, and a share of it is written by least squares
against ordinary text (eq. 14). Every context's key of a fact is met, and the keys of other subjects in the same
sentences count as ordinary text (contrast.py). In post-norm networks (Gemma) a norm lies between the MLP and the
residual stream, so that what is written there is rescaled: for those the target is the MLP's own output, at one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from gnomon.edit.contexts import Context
from gnomon.edit.contrast import Avoided
from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.passes import Rows
from gnomon.edit.registry import Change, SearchOptions, edit_method
from gnomon.edit.search import find_value
from gnomon.edit.solve import Factors, keep_relative, least_squares, restrain
from gnomon.edit.vectors import remembered
from gnomon.errors import EditError
from gnomon.models.patch import Dense, Sparse
from gnomon.progress import progress

AT_ONCE = 8
"""Facts whose keys are read in one forward."""


class SpreadOptions(SearchOptions):
    """Options of all methods that spread a batch over layers."""

    several_keys: Annotated[bool, Field(description="Meet every context's key, not only their mean.")] = True


class MemitOptions(SpreadOptions):
    """MEMIT's options."""

    weight: Annotated[float, Field(gt=0, description="How much ordinary text counts against the facts.")] = 15.0
    residual: Annotated[float, Field(gt=0, le=1, description="n - i to this power divides what is missing.")] = 1.0
    contrast: Annotated[
        float, Field(ge=0, description="How much other subjects in the same sentences count as ordinary text.")
    ] = 1.0


@dataclass(frozen=True)
class Targets:
    """Every fact's contexts and the wanted output at its subject: of the layer, or of its MLP in post-norm networks."""

    contexts: list[list[Context]]
    wanted_UC: Tensor
    notes: list[dict[str, Any]]
    at_layer: bool


Solve = Callable[[int, Tensor, Tensor], Factors]
"""(layer, keys [M, B], residuals [C, B]) -> the change as factors, the left one being the residuals themselves.

All keys of a fact have the same residual."""


@edit_method("memit", MemitOptions, paper="2210.07229")
def memit(editor: Editor, facts: Sequence[Fact], options: MemitOptions) -> Change:
    """A batch of facts spread over several layers by least squares."""
    layers = editor.layers(options.layers, "memit")
    return as_change(
        editor, *spread(editor, facts, layers, options, least(editor, facts, options), power=options.residual)
    )


@edit_method("pmet", MemitOptions, paper="2308.08742")
def pmet(editor: Editor, facts: Sequence[Fact], options: MemitOptions) -> Change:
    """MEMIT with a square-root spread of what is missing, as PMET does it."""
    layers = editor.layers(options.layers, "pmet")
    return as_change(editor, *spread(editor, facts, layers, options, least(editor, facts, options), power=0.5))


class RectOptions(MemitOptions):
    """RECT's options."""

    share: Annotated[float, Field(gt=0, le=1, description="Share of entries kept, by |change / weight|.")] = 0.4


@edit_method("rect", RectOptions, paper="2401.04700")
def rect(editor: Editor, facts: Sequence[Fact], options: RectOptions) -> Change:
    """MEMIT's change, of which only the entries with the largest relative change are kept."""
    layers = editor.layers(options.layers, "rect")
    pending, notes = spread(editor, facts, layers, options, least(editor, facts, options))
    deltas: dict[str, Any] = {}
    for layer, (left, right) in pending.items():
        kept = keep_relative(left @ right, editor.anatomy.downs[layer].weight_CM.double(), options.share)
        stored = _stored(editor, layer, kept)
        flat = stored.flatten()
        indices = flat.nonzero()[:, 0]
        deltas[editor.tensor(layer)] = Sparse(indices, flat[indices].contiguous(), tuple(stored.shape))
    return Change(deltas, notes)


@edit_method("prune", MemitOptions, paper="2405.16821")
def prune(editor: Editor, facts: Sequence[Fact], options: MemitOptions) -> Change:
    """MEMIT's change of the whole sequence, its singular values restrained to those of the weight."""
    layers = editor.layers(options.layers, "prune")
    pending, notes = spread(editor, facts, layers, options, least(editor, facts, options))
    deltas = {
        editor.tensor(layer): Dense(
            _stored(editor, layer, restrain(left @ right, editor.anatomy.downs[layer].weight_CM))
        )
        for layer, (left, right) in pending.items()
    }
    return Change(deltas, notes)


def least(editor: Editor, facts: Sequence[Fact], options: MemitOptions) -> Solve:
    """MEMIT's solve."""
    avoided = Avoided(editor, facts, options.contrast)

    def solve(layer: int, keys_MB: Tensor, residuals_CB: Tensor) -> Factors:
        factor = avoided.factor(layer, options.ridge)
        return least_squares(factor, keys_MB, residuals_CB, options.weight)

    return solve


def spread(
    editor: Editor,
    facts: Sequence[Fact],
    layers: Sequence[int],
    options: SpreadOptions,
    solve: Solve,
    *,
    power: float = 1.0,
    early: bool = False,
) -> tuple[dict[int, Factors], list[dict[str, Any]]]:
    """The common course: targets once, then layer after layer keys, what is missing, and the solve."""
    layers = [layers[-1]] if editor.anatomy.post_norm else list(layers)
    editor.moments(layers)
    goals = targets(editor, facts, layers[-1], options, early=early)
    pending: dict[int, Factors] = {}
    for i, layer in enumerate(layers):
        with editor.wearing(pending):
            keys_BM, owner_B, now_UC = keys_and_outputs(editor, goals, layer, layers[-1], several=options.several_keys)
        missing_UC = (goals.wanted_UC - now_UC) / (len(layers) - i) ** power
        _, right_BM = solve(layer, keys_BM.T, missing_UC[owner_B].T)
        right_UM = torch.zeros(len(facts), right_BM.shape[1], dtype=right_BM.dtype).index_add_(0, owner_B, right_BM)
        pending[layer] = missing_UC.double().T, right_UM
    for told, layer in ((note, layer) for note in goals.notes for layer in layers):
        left, right = pending[layer]
        weight = editor.anatomy.downs[layer].weight_CM
        told.setdefault("relative_norm", {})[str(layer)] = round(float((left @ right).norm() / weight.norm()), 5)
    return pending, goals.notes


def targets(
    editor: Editor, facts: Sequence[Fact], layer: int, options: SearchOptions, *, early: bool = False
) -> Targets:
    """Search every fact's target in the original model; found ones are kept in the cache, so that work can be resumed.

    Raises EditError naming the fact whose search failed; nothing is distributed then.
    """
    at_layer = not editor.anatomy.post_norm
    maker = editor.contexts(options.prefixes, chat=options.chat, frames=options.frames)
    wanted, notes = [], []
    with progress("facts", len(facts)) as bar:
        for fact in facts:
            try:
                search = partial(_target, editor, fact, layer, options, at_layer, early)
                vector, note = remembered(editor, fact, layer, options, search)
            except EditError as error:
                raise EditError(f"`{fact.prompt}`: {error.message}", hint=error.hint) from None
            wanted.append(vector)
            notes.append({"layer": layer, **note})
            bar.advance()
    return Targets([maker.of(fact) for fact in facts], torch.stack(wanted), notes, at_layer)


def _target(
    editor: Editor, fact: Fact, layer: int, options: SearchOptions, at_layer: bool, early: bool
) -> tuple[Tensor, dict[str, Any]]:
    found = find_value(editor, fact, layer, options, at_layer=at_layer, early=early)
    captured = found.value.captured
    start = captured.layer_BC if at_layer else captured.output_BC
    contexts = len(found.keys_BM)
    note = {
        "steps": found.value.steps,
        "loss": [round(found.value.loss_before, 4), round(found.value.loss, 4)],
    }
    return _balanced(start[:contexts]) + found.value.delta_C, note


def keys_and_outputs(
    editor: Editor, goals: Targets, layer: int, last: int, *, several: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys at `layer` [B, M] with the fact each belongs to [B], and outputs at `last` [U, C].

    several: one key per context; otherwise one per fact, in which the bare prompt weighs one half, as in the outputs.
    """
    keys, owners, outputs = [], [], []
    for start in range(0, len(goals.contexts), AT_ONCE):
        group = goals.contexts[start : start + AT_ONCE]
        flat = [context for contexts in group for context in contexts]
        rows = Rows.align([c.ids[: c.subject + 1] for c in flat], [c.subject for c in flat])
        at_key, at_last = editor.passes.sites(rows, layer, last, at_layer=goals.at_layer)
        sizes = [len(contexts) for contexts in group]
        for n, (own_BM, out_BC) in enumerate(zip(torch.split(at_key, sizes), torch.split(at_last, sizes), strict=True)):
            keys.append(own_BM if several else _balanced(own_BM)[None])
            owners += [start + n] * len(keys[-1])
            outputs.append(_balanced(out_BC))
    return torch.cat(keys), torch.tensor(owners), torch.stack(outputs)


def as_change(editor: Editor, pending: dict[int, Factors], notes: list[dict[str, Any]]) -> Change:
    return Change({editor.tensor(layer): editor.low_rank(layer, f) for layer, f in pending.items()}, notes)


def _balanced(rows: Tensor) -> Tensor:
    """Mean of the bare prompt (first row) and the mean of the others."""
    return rows[0] if len(rows) == 1 else (rows[0] + rows[1:].mean(0)) / 2


def _stored(editor: Editor, layer: int, delta_CM: Tensor) -> Tensor:
    """A change as the module stores its weight, float32."""
    return (delta_CM.T if editor.anatomy.downs[layer].transposed else delta_CM).float().contiguous()
