"""Moments: C = E[k k^T], the uncentred second moment of an MLP's inner activations over ordinary text.

In go texts; out comes one [M, M] matrix per layer with its token count. All layers are taken in one pass, which stops
at the highest; sums are float64; work can be interrupted and goes on where it stopped. Kept in the cache by what the
matrix depends on: the weights, the layer, the corpus and the number of tokens. Knows nothing of edits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gnomon.edit.passes import Passes, Rows
from gnomon.errors import EditError, UsageError
from gnomon.models.cache import atomic_write, cache_dir
from gnomon.progress import progress

if TYPE_CHECKING:
    from gnomon.model import Model

SELF = "self"
SELF_TEXT_TOKENS = 96
SELF_AT_ONCE = 64
TOKENS = 4_000
BATCH_TOKENS = 512
SAVE_EVERY = 16
"""Batches between two saves of unfinished work."""


@dataclass(frozen=True)
class Moment:
    """One layer's second moment. Addable: the moment of two samples together."""

    sum_MM: Tensor
    tokens: int
    corpus: str

    @property
    def mean_MM(self) -> Tensor:
        return self.sum_MM / max(self.tokens, 1)

    def __add__(self, other: Moment) -> Moment:
        corpus = self.corpus if self.corpus == other.corpus else f"{self.corpus}+{other.corpus}"
        return Moment(self.sum_MM + other.sum_MM, self.tokens + other.tokens, corpus)

    def describe(self) -> dict[str, Any]:
        """What a report says of it."""
        values = torch.linalg.eigvalsh(self.mean_MM).clamp(min=0)
        total = float(values.sum())
        entropy = -(values / total * (values / total).clamp(min=1e-300).log()).sum()
        smallest = float(values[0])
        return {
            "corpus": self.corpus,
            "tokens": self.tokens,
            "trace": total,
            "effective_rank": float(entropy.exp()),
            "condition": float(values[-1]) / smallest if smallest > 0 else float("inf"),
        }


def identity_moment(size: int) -> Moment:
    """C = I, for those who ask for it by name; what FastEdit and EasyEdit's default call ROME."""
    return Moment(torch.eye(size, dtype=torch.float64), 1, "identity")


def moments(
    model: Model, passes: Passes, layers: Sequence[int], *, corpus: str = SELF, tokens: int = TOKENS, seed: int = 0
) -> dict[int, Moment]:
    """The second moments of these layers, from the cache where they are known.

    corpus: "self" (text sampled from the model), "identity", or the path of a text file. Raises UsageError, EditError.
    """
    if corpus == "identity":
        return {layer: identity_moment(passes.anatomy.inner) for layer in layers}
    source = f"self:{seed}" if corpus == SELF else "file:" + _file_digest(Path(corpus))
    paths = {layer: _path(model, layer, source, tokens) for layer in layers}
    found = {layer: moment for layer, path in paths.items() if (moment := _read(path)) is not None}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        texts = _self_texts(model, tokens, seed) if corpus == SELF else _file_texts(model, Path(corpus))
        name = "self" if corpus == SELF else Path(corpus).name
        unfinished = paths[missing[0]].with_suffix(f".{'-'.join(map(str, missing))}.part")
        for layer, moment in _gather(passes, texts, missing, tokens, name, unfinished).items():
            found[layer] = moment
            _write(paths[layer], {layer: moment}, 0)
        unfinished.unlink(missing_ok=True)
    return found


def gather(
    passes: Passes, texts: Iterable[list[int]], layers: Sequence[int], tokens: int, name: str
) -> dict[int, Moment]:
    """The moments of these layers over token id lists, without any cache."""
    return _gather(passes, texts, layers, tokens, name, None)


def _gather(
    passes: Passes, texts: Iterable[list[int]], layers: Sequence[int], tokens: int, name: str, unfinished: Path | None
) -> dict[int, Moment]:
    size = passes.anatomy.inner
    sums = {layer: torch.zeros(size, size, dtype=torch.float64) for layer in layers}
    done, batches = 0, 0
    if unfinished is not None and (known := _load(unfinished)) is not None:
        sums = {layer: known[f"layer.{layer}"] for layer in layers}
        done, batches = int(known["tokens"]), int(known["batches"])
    with progress(f"moments of layers {', '.join(map(str, layers))}", tokens) as bar:
        bar.advance(done)
        for batch in islice(_batches(texts), batches, None):
            if done >= tokens:
                break
            rows = Rows.align(batch, [0] * len(batch))
            real = rows.mask_BT.bool()
            for layer, keys in passes.keys(rows, layers).items():
                chosen = keys[real].float()
                sums[layer] += (chosen.T @ chosen).double()
            done += int(real.sum())
            batches += 1
            bar.advance(int(real.sum()))
            if unfinished is not None and batches % SAVE_EVERY == 0:
                _write(unfinished, {layer: Moment(total, done, name) for layer, total in sums.items()}, batches)
    if done == 0:
        raise EditError(f"The corpus `{name}` holds no text.")
    return {layer: Moment(total, done, name) for layer, total in sums.items()}


def _batches(texts: Iterable[list[int]]) -> Iterator[list[list[int]]]:
    """Texts grouped to about BATCH_TOKENS."""
    batch: list[list[int]] = []
    for ids in texts:
        if batch and sum(map(len, batch)) + len(ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def _self_texts(model: Model, tokens: int, seed: int) -> Iterator[list[int]]:
    """Text that the model itself writes: on its own distribution, always at hand, without anyone's licence.

    Each begins with one of the tokens most likely at a text's beginning, in turn, so that no two are alike.
    """
    bos = model.tokenizer.bos_token_id
    start = [bos] if bos is not None else model.encode("The")
    likely = model.logits(start)[-1]
    usable = [i for i in likely.topk(min(512, len(likely))).indices.tolist() if not model.tokenizer.is_special(i)]
    asked = 0
    while asked < tokens:
        group = range(asked // SELF_TEXT_TOKENS, asked // SELF_TEXT_TOKENS + SELF_AT_ONCE)
        prompts = [[*start, usable[i % len(usable)]] for i in group]
        options = {"max_tokens": SELF_TEXT_TOKENS, "ignore_eos": True, "temperature": 1.0, "top_k": 50}
        handles = [model.submit(p, {**options, "seed": seed + i}) for p, i in zip(prompts, group, strict=True)]
        for prompt, handle in zip(prompts, handles, strict=True):
            yield prompt + handle.collect()[0].token_ids
            asked += SELF_TEXT_TOKENS


def _file_texts(model: Model, path: Path) -> Iterator[list[int]]:
    """A text file in pieces of SELF_TEXT_TOKENS tokens, broken between paragraphs where possible."""
    for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if paragraph.strip():
            ids = model.encode(paragraph.strip())
            yield from (ids[i : i + SELF_TEXT_TOKENS] for i in range(0, len(ids), SELF_TEXT_TOKENS))


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(
            f"The corpus {path} cannot be read: {error.strerror}.",
            hint='Give a text file, or "self" for text sampled from the model.',
            param="moments",
        ) from None


def _path(model: Model, layer: int, source: str, tokens: int) -> Path:
    profile = model.profile
    parts: dict[str, Any] = {"weights": profile.weights if profile else model.checkpoint.identity}
    parts |= {
        "dtype": profile.dtype if profile else "",
        "layer": layer,
        "corpus": source,
        "tokens": tokens,
        "version": 1,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "edit" / "moments" / f"{key}.safetensors"


def _write(path: Path, found: dict[int, Moment], batches: int) -> None:
    from safetensors.torch import save

    any_one = next(iter(found.values()))
    tensors = {f"layer.{layer}": moment.sum_MM for layer, moment in found.items()}
    tensors |= {"tokens": torch.tensor(any_one.tokens), "batches": torch.tensor(batches)}
    with atomic_write(path) as out:
        out.write(save(tensors, metadata={"corpus": any_one.corpus}))


def _load(path: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _read(path: Path) -> Moment | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            name = next(key for key in handle.keys() if key.startswith("layer."))  # noqa: SIM118
            corpus = (handle.metadata() or {})["corpus"]
            return Moment(handle.get_tensor(name), int(handle.get_tensor("tokens")), corpus)
    except (OSError, SafetensorError):
        return None
