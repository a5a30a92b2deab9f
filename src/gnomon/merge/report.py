"""After a merge: what came of it, layer by layer, in plain values (`report_page.py` makes a page of them).

Norms of task vectors and of the result, cosines, sign conflicts, NaN; perplexities on a text where one is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gnomon.errors import MergeError
from gnomon.loading import load
from gnomon.merge.geometry import TensorGeometry, cosines, geometry, summed
from gnomon.merge.merged import MergedCheckpoint
from gnomon.merge.perplexity import Text, text_loss
from gnomon.models.checkpoint import Checkpoint

RESULT = "merge"


@dataclass(frozen=True)
class Group:
    """A layer, or what stands outside of all. relative: each vector's norm over the base's. cosine: with the result."""

    name: str
    tensors: int
    relative: Mapping[str, float]
    cosine: Mapping[str, float]
    sign_conflicts: float
    nonfinite: int


@dataclass
class MergeReport:
    """Everything in plain values."""

    identity: str
    method: str
    inputs: dict[str, str]
    warnings: list[str]
    groups: list[Group]
    whole: Group
    perplexity: dict[str, float] = field(default_factory=dict)
    text_tokens: int = 0
    has_base: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def report(
    merged: MergedCheckpoint,
    *,
    result: Checkpoint | None = None,
    text: Text | None = None,
    most_tokens: int | None = None,
    blocks: int | None = 8,
) -> MergeReport:
    """result: the written model where there is one (else tensors are computed again). text: measured on all models."""
    if result is not None:
        _check_result(merged, result)
    result = result or merged
    base = _base(merged)
    models = {reference: model for reference, model in merged.models.items() if model is not base}
    parts = geometry({**models, RESULT: result}, base, threads=merged.threads, blocks=blocks)
    by_layer: dict[str, list[TensorGeometry]] = {}
    for part in parts:
        by_layer.setdefault("outside of the layers" if part.layer is None else f"layer {part.layer}", []).append(part)
    names = [*models, RESULT]
    groups = [_group(name, members, names) for name, members in sorted(by_layer.items(), key=_order)]
    methods = sorted({tensor.method for tensor in merged.plan.tensors if tensor.method})
    inputs = {reference: model.identity for reference, model in merged.models.items()}
    whole = _group("all", parts, names)
    found = MergeReport(merged.identity, ", ".join(methods), inputs, list(merged.plan.warnings), groups, whole)
    found.has_base = base is not None
    if text is not None:
        for name, checkpoint in {**merged.models, RESULT: result}.items():
            with load(checkpoint, max_sequences=1, ledger=False) as model:
                loss = text_loss(model, text, most_tokens=most_tokens)
            found.perplexity[name], found.text_tokens = loss.perplexity, loss.tokens
    return found


def _check_result(merged: MergedCheckpoint, result: Checkpoint) -> None:
    for name in merged:
        if name not in result or result.info(name).shape != merged.info(name).shape:
            raise MergeError(
                f"{result.reference} is no result of this merge: `{name}` is missing in it or has another shape.",
                param="model",
            )


def _base(merged: MergedCheckpoint) -> Checkpoint | None:
    bases = {tensor.base.model for tensor in merged.plan.tensors if tensor.base is not None}
    return merged.models[bases.pop()] if len(bases) == 1 else None


def _order(item: tuple[str, Any]) -> tuple[int, int]:
    name = item[0]
    return (0, int(name.split()[1])) if name.startswith("layer ") else (1, 0)


def _group(name: str, parts: list[TensorGeometry], names: list[str]) -> Group:
    square, products = summed(parts)
    cosine = cosines(products)
    last = len(names) - 1
    lengths = products.diagonal().clamp_min(0).sqrt().tolist()
    compared = sum(part.compared for part in parts)
    return Group(
        name,
        len(parts),
        {n: length / square**0.5 if square else length for n, length in zip(names, lengths, strict=True)},
        {n: float(cosine[i, last]) for i, n in enumerate(names[:-1])},
        sum(part.conflicts for part in parts) / compared if compared else 0.0,
        sum(sum(part.nonfinite) for part in parts),
    )
