"""Another model's tokenizer for a model: the body stays, the tables of tokens are rebuilt (arXiv 2506.06607).

A token that both vocabularies have keeps its row. Another one's row in the tokenizer's own model is written as a sparse
combination of the rows of common tokens (orthogonal matching pursuit); the same combination of this model's rows of
those tokens is its new row. Legend: N common tokens, B tokens at a time, D channels of the donor, H of the model, k
atoms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gnomon.errors import MergeError, UsageError
from gnomon.kernels import available_threads
from gnomon.merge.layout import HEADS, is_vocabulary_table
from gnomon.merge.merged import MergedCheckpoint
from gnomon.merge.planned import MergePlan, Source, TensorPlan
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.held_checkpoint import HeldCheckpoint
from gnomon.progress import progress

METHODS = ("omp", "mean", "zero")
BATCH = 256
TABLES = "the new tables"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def transplant(
    model: Checkpoint, donor: Checkpoint, *, atoms: int = 64, method: str = "omp", threads: int = 0
) -> MergedCheckpoint:
    """`model` with `donor`'s tokenizer, nothing written.

    atoms: most rows that one combination takes. method: omp, or how a new row is made without looking at the donor's.
    Raises MergeError, UsageError.
    """
    if method not in METHODS:
        raise UsageError(f"--method is one of {', '.join(METHODS)}, not `{method}`.", param="method")
    if atoms < 1:
        raise UsageError(f"--atoms must be at least 1, not {atoms}.", param="atoms")
    size = int(donor.config.get("vocab_size") or 0)
    own, theirs = _ids(model), _ids(donor)
    common = [token for token in theirs if token in own and theirs[token] < size]
    if not common:
        raise MergeError(f"{model.reference} and {donor.reference} have no token in common.")
    shared = [(theirs[token], own[token]) for token in common]
    named, taken = set(theirs.values()), set(own.values())
    # padding: rows without a token stay where they are, if this model has such a row there too
    spare = [(row, row) for row in range(size) if row not in named and row not in taken]
    rows = int(model.config.get("vocab_size") or 0)
    places = _Places(shared, [pair for pair in spare if pair[0] < rows], sorted(named - {new for new, _ in shared}))
    tables = [n for n in model if is_vocabulary_table(n, model.info(n).shape, model.config.get("vocab_size"))]
    rebuilt = {
        name: _rebuilt(model[name], donor[_name_in(donor, name)], places, size, atoms, method) for name in tables
    }
    held = HeldCheckpoint(TABLES, rebuilt)
    models: dict[str, Checkpoint] = {model.reference: model, donor.reference: donor, TABLES: held}
    planned = []
    for name in model:
        info = held.info(name) if name in rebuilt else model.info(name)
        source = Source(TABLES if name in rebuilt else model.reference, name)
        dtype = info.dtype if info.dtype.islower() else "float32"
        kept = {"scale": [None]}
        planned.append(TensorPlan(name, info.shape, dtype, "passthrough", (source,), None, kept))
    told = f"{len(common)} tokens keep their rows; {len(places.missing)} rows are made by {method}."
    plan = MergePlan(tuple(sorted(planned, key=lambda tensor: tensor.name)), donor.reference, None, (told,))
    config: dict[str, Any] = {**model.config, "vocab_size": size}
    config |= {key: donor.config[key] for key in SPECIAL_IDS if key in donor.config}
    merged = MergedCheckpoint(
        plan, models, reference=model.reference, config=config, threads=threads or available_threads()
    )
    merged.generation_config = {**model.generation_config} | {
        key: value for key, value in donor.generation_config.items() if key in SPECIAL_IDS
    }
    return merged


def _ids(checkpoint: Checkpoint) -> Mapping[str, int]:
    """token -> row, of the tokens that have a row."""
    rows = int(checkpoint.config.get("vocab_size") or 0)
    found = checkpoint.tokenizer().backend.get_vocab(with_added_tokens=True)
    return {token: row for token, row in sorted(found.items(), key=lambda pair: pair[1]) if row < rows}


def _name_in(donor: Checkpoint, name: str) -> str:
    """The donor's table of that name; its input table where its head is tied."""
    found = name if name in donor else HEADS.get(name, name)
    if found not in donor:
        raise MergeError(f"{donor.reference} has no table `{name}`.")
    return found


@dataclass(frozen=True)
class _Places:
    """Which rows go where: (new, own) of common tokens and of padding; and the tokens that only the donor has."""

    shared: list[tuple[int, int]]
    padding: list[tuple[int, int]]
    missing: list[int]


def _rebuilt(own_VH: Tensor, donor_VD: Tensor, places: _Places, size: int, atoms: int, method: str) -> Tensor:
    """The table in the donor's order."""
    theirs_N, own_N = torch.tensor(places.shared).unbind(1)
    known_NH = own_VH[own_N].float()
    out_VH = torch.zeros(size, own_VH.shape[1])
    if method == "mean":
        out_VH[:] = known_NH.mean(0)
    elif method == "omp":
        rows = torch.tensor(places.missing, dtype=torch.int64)
        atoms_ND = donor_VD[theirs_N].float()
        with progress("rebuilding rows", total=len(rows)) as bar:
            for start in range(0, len(rows), BATCH):
                part = rows[start : start + BATCH]
                chosen_Bk, weights_Bk = matching_pursuit(donor_VD[part].float(), atoms_ND, atoms)
                out_VH[part] = (known_NH[chosen_Bk] * weights_Bk.unsqueeze(-1)).sum(1)
                bar.advance(len(part))
    out_VH[theirs_N] = known_NH
    for new, own in places.padding:
        out_VH[new] = own_VH[own]
    return out_VH.to(own_VH.dtype)


def matching_pursuit(targets_BD: Tensor, atoms_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(chosen [B, k], weights [B, k]): each target as a combination of at most `count` atoms.

    Greedy: the atom whose direction the residual has most of, then all weights anew by least squares.
    """
    count = min(count, len(atoms_ND), atoms_ND.shape[1])
    lengths_N = atoms_ND.norm(dim=1)
    units_ND = atoms_ND / lengths_N.clamp(min=1e-12).unsqueeze(1)
    residual_BD, chosen = targets_BD, []
    weights_Bk = torch.zeros(len(targets_BD), 0)
    free_BN = (lengths_N > 1e-12).expand(len(targets_BD), -1).clone()
    for _ in range(count):
        match_BN = (residual_BD @ units_ND.T).abs().masked_fill(~free_BN, -1.0)
        picked_B = match_BN.argmax(1)
        chosen.append(picked_B)
        free_BN.scatter_(1, picked_B.unsqueeze(1), False)
        basis_BDk = atoms_ND[torch.stack(chosen, 1)].transpose(1, 2).double()
        weights_Bk = torch.linalg.lstsq(basis_BDk, targets_BD.double().unsqueeze(-1)).solution.squeeze(-1).float()
        residual_BD = targets_BD - (basis_BDk @ weights_Bk.double().unsqueeze(-1)).squeeze(-1).float()
        if float(residual_BD.abs().max()) < 1e-7 * float(targets_BD.abs().max()):
            break
    return torch.stack(chosen, 1), weights_Bk
