"""Causal tracing and attention knockout: where in the network a fact is recalled.

Tracing (ROME, arXiv 2202.05262, section 2): noise on the subject's embeddings destroys the answer; states of the clean
run are then restored one place at a time; how much of the answer's probability comes back is the effect of that place.
Knockout (2304.14767): the last position may not attend to some tokens in a window of layers; how much probability is
lost says where what is read. In goes a prompt with its subject; out come numbers. Neither predicts the best layer to
edit (2301.04213): these are pictures to look at, not a way to choose.
Legend: L layers, T tokens, S noise samples, B rows, C hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gnomon.edit.contexts import locate
from gnomon.edit.passes import skipped
from gnomon.errors import UsageError
from gnomon.progress import progress

if TYPE_CHECKING:
    from gnomon.edit.editor import Editor

KINDS = ("state", "mlp", "attention")
Change = tuple[nn.Module, Callable[..., Any]]
"""A module and the forward hook that changes what it gives."""


@dataclass(frozen=True)
class Trace:
    """What was found. effects: kind -> [L][T] probability of the answer with that place restored. knockout: group of
    tokens -> [L] probability with the last position blind to it around that layer.
    """

    prompt: str
    answer: str
    tokens: list[str]
    subject: list[int]
    clean: float
    corrupted: float
    window: int
    effects: dict[str, list[list[float]]]
    knockout: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def trace(
    editor: Editor,
    prompt: str,
    subject: str,
    *,
    answer: str | None = None,
    samples: int = 4,
    noise: float = 3.0,
    window: int = 6,
    seed: int = 0,
) -> Trace:
    """Trace one prompt. answer: whose first token is followed (default: what the model itself says next).

    noise: its size in standard deviations of the embeddings. window: layers restored or blinded at once around each one
    (single states are restored alone). Raises UsageError for a subject that is not in the prompt once.
    """
    if prompt.count(subject) != 1 or not subject:
        raise UsageError(f"The subject `{subject}` must stand once in the prompt `{prompt}`.", param="subject")
    model, anatomy = editor.model, editor.anatomy
    start = prompt.index(subject)
    ids, inside = locate(model.tokenizer, prompt, (start, start + len(subject)))
    ids_T = torch.tensor(ids)
    with editor.alone(), torch.no_grad():
        states: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        with _recording(editor, states):
            logp = _last(editor, ids_T[None], [])
        wanted = _answer_token(editor, prompt, answer, logp[0])
        shift = _noise(editor, ids_T, inside, noise, samples, seed)
        entering: list[Tensor] = []
        with _entering(editor, entering):
            corrupted = float(_last(editor, ids_T.expand(samples, -1), [shift])[:, wanted].exp().mean())
        count = len(anatomy.layers)
        effects: dict[str, list[list[float]]] = {}
        with progress("tracing", len(KINDS) * count) as bar:
            for kind in KINDS:
                reach = 1 if kind == "state" else window
                effects[kind] = []
                for layer in range(count):
                    around = _window(layer, reach, count)
                    shares = _restored(editor, ids_T, entering[around.start], kind, around, states[kind], wanted)
                    effects[kind].append(shares)
                    bar.advance()
        groups = {
            "subject": inside,
            "before": list(range(1, inside[0])),
            "after": list(range(inside[-1] + 1, len(ids) - 1)),
        }
        groups = {name: tokens for name, tokens in groups.items() if tokens}
        knockout = {name: [_blinded(editor, ids_T, g, _window(n, window, count), wanted) for n in range(count)]
                    for name, g in groups.items()}  # fmt: skip
    pieces = [model.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    said = model.tokenizer.decode([wanted], skip_special_tokens=False)
    clean = float(logp[0, wanted].exp())
    return Trace(prompt, said, pieces, inside, clean, corrupted, window, effects, knockout)


def _answer_token(editor: Editor, prompt: str, answer: str | None, logp_V: Tensor) -> int:
    from gnomon.edit.facts import continued

    if answer is None:
        return int(logp_V.argmax())
    ids: list[int] = editor.model.tokenizer.encode(continued(prompt, answer), add_special_tokens=False)
    return ids[0]


def _noise(editor: Editor, ids_T: Tensor, inside: Sequence[int], size: float, samples: int, seed: int) -> Change:
    """A hook that adds the same seeded noise to the subject's embeddings in every pass."""
    table: Any = editor.anatomy.module.get_input_embeddings()
    some = torch.arange(0, table.weight.shape[0], max(table.weight.shape[0] // 4096, 1))
    deviation = float(table(some).std())
    generator = torch.Generator().manual_seed(seed)
    width = table(ids_T[:1]).shape[-1]
    noise_STC = torch.randn(samples, len(inside), width, generator=generator) * size * deviation

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, list(inside)] += noise_STC.repeat(output.shape[0] // samples, 1, 1)
        return changed

    return table, add


def _restored(
    editor: Editor,
    ids_T: Tensor,
    entering_STC: Tensor,
    kind: str,
    around: range,
    clean: list[Tensor],
    wanted: int,
) -> list[float]:
    """Probability of the answer with the clean `kind` of these layers restored, one token a row -> [T].

    entering: what enters the first of these layers in the corrupted runs; the layers below are not run again.
    """
    tokens, samples = len(ids_T), len(entering_STC)
    rows = torch.arange(tokens).repeat_interleave(samples)

    def restore(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            whole = (output[0] if isinstance(output, tuple) else output).clone()
            whole[torch.arange(len(rows)), rows] = clean[layer][0, rows]
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        return hook

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        corrupted = entering_STC.repeat(tokens, 1, 1)
        return ((corrupted, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": corrupted})

    changes = [(_site(editor, kind, layer), restore(layer)) for layer in around]
    layers = editor.anatomy.layers
    handle = layers[around.start].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with skipped(layers[: around.start]):
            logp = _last(editor, ids_T.expand(tokens * samples, -1), changes)
    finally:
        handle.remove()
    shares: list[float] = logp[:, wanted].exp().view(tokens, samples).mean(1).tolist()
    return shares


def _blinded(editor: Editor, ids_T: Tensor, hidden: Sequence[int], around: range, wanted: int) -> float:
    """Probability of the answer when the last position cannot attend to these tokens in these layers."""
    count = len(ids_T)
    allowed = torch.ones(count, count, dtype=torch.bool).tril()
    allowed[-1, list(hidden)] = False
    mask = torch.zeros(1, 1, count, count).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def blind(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    handles = [editor.anatomy.layers[layer].register_forward_pre_hook(blind, with_kwargs=True) for layer in around]
    try:
        return float(_last(editor, ids_T[None], [])[0, wanted].exp())
    finally:
        for handle in handles:
            handle.remove()


def _last(editor: Editor, ids_BT: Tensor, changes: Sequence[Change]) -> Tensor:
    """log p of the next token after the whole prompt, with these hooks in place -> [B, V]."""
    handles = [module.register_forward_hook(hook) for module, hook in changes]
    try:
        mask = torch.ones_like(ids_BT)
        hidden = editor.anatomy.base(input_ids=ids_BT, attention_mask=mask, use_cache=False).last_hidden_state
        return torch.log_softmax(editor.anatomy.logits(hidden[:, -1]).float(), -1)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recording(editor: Editor, states: dict[str, list[Tensor]]) -> Iterator[None]:
    """Inside the block every layer's clean outputs are kept."""

    def keep(kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[kind].append((output[0] if isinstance(output, tuple) else output).clone())

        return hook

    sites = [(kind, layer) for kind in KINDS for layer in range(len(editor.anatomy.layers))]
    handles = [_site(editor, kind, layer).register_forward_hook(keep(kind)) for kind, layer in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _entering(editor: Editor, found: list[Tensor]) -> Iterator[None]:
    """Inside the block what enters each layer is kept, in order."""

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).clone())

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in editor.anatomy.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _site(editor: Editor, kind: str, layer: int) -> nn.Module:
    """The module whose output is this layer's state, what its MLP gives, or what its attention gives."""
    block = editor.anatomy.layers[layer]
    if kind == "state":
        return block
    if kind == "mlp":
        return editor.anatomy.downs[layer].module
    for name, part in block.named_children():
        if ("attn" in name.lower() or "attention" in name.lower()) and "norm" not in name.lower():
            return part
    raise UsageError(f"Layer {layer} has no attention that could be traced.")


def _window(layer: int, size: int, count: int) -> range:
    """`size` layers around one, cut at the ends."""
    first = max(0, layer - size // 2)
    return range(first, min(count, layer - size // 2 + size))
