"""How models lie to each other, tensor by tensor: norms, cosines, sign conflicts, NaN. Read-only, in blocks.

Of a tensor with many blocks, evenly chosen ones are measured; each record says how many of its elements were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView, total
from gnomon.merge.layout import NUMBERED
from gnomon.merge.parallel import ordered_map
from gnomon.merge.randomness import CounterRandomness
from gnomon.models.checkpoint import Checkpoint

SAMPLED_BLOCKS = 8


@dataclass(frozen=True)
class TensorGeometry:
    """One tensor. vectors are task vectors where there is a base, else the models themselves.

    products: [n, n] inner products of the vectors, so that sums over tensors are those of whole models.
    conflicts: elements on which the signs of two vectors differ, of `compared` on which at least two are not 0.
    """

    name: str
    layer: int | None
    elements: int
    measured: int
    base_square: float
    products: Tensor
    conflicts: int
    compared: int
    nonfinite: tuple[int, ...]

    def norms(self) -> list[float]:
        return [math.sqrt(max(0.0, float(v))) for v in self.products.diagonal()]


def geometry(
    models: Mapping[str, Checkpoint], base: Checkpoint | None, *, threads: int = 1, blocks: int | None = SAMPLED_BLOCKS
) -> list[TensorGeometry]:
    """Every floating-point tensor that all of them have with one shape. blocks: most blocks measured of a tensor."""
    everyone = [*models.values(), *([base] if base is not None else [])]
    found = []
    for name in everyone[0]:
        if any(name not in checkpoint for checkpoint in everyone):
            continue
        infos = [checkpoint.info(name) for checkpoint in everyone]
        if len({info.shape for info in infos}) > 1 or any("int" in i.dtype or i.dtype == "bool" for i in infos):
            continue
        readers = [checkpoint.reader(name) for checkpoint in models.values()]
        own = base.reader(name) if base is not None else None
        random = CounterRandomness()
        view = TensorView(name, infos[0].shape, readers, own, torch.float32, random, allow_nonfinite=True)
        found.append(_measure(view, threads, blocks))
    return found


def _measure(view: TensorView, threads: int, most: int | None) -> TensorGeometry:
    count = view.block_count()
    step = 1 if most is None or count <= most else count / most
    chosen = sorted({int(place * step) for place in range(count if step == 1 else most or count)})
    rows = ordered_map(lambda index: _of_block(view.block(index)), chosen, threads)
    models = len(view.readers)
    match = NUMBERED.match(view.name)
    products = sum((row[1] for row in rows), torch.zeros(models, models, dtype=torch.float64))
    bad = [sum(row[4][place] for row in rows) for place in range(models)]
    return TensorGeometry(
        view.name,
        int(match[2]) if match else None,
        view.numel,
        sum(row[5] for row in rows),
        math.fsum(row[0] for row in rows),
        products,
        sum(row[2] for row in rows),
        sum(row[3] for row in rows),
        tuple(bad),
    )


def _of_block(block: Block) -> tuple[float, Tensor, int, int, list[int], int]:
    vectors = block.vectors()
    bad = [int((~vector.isfinite()).sum()) for vector in vectors]
    if any(bad):
        vectors = [vector.nan_to_num(0.0, 0.0, 0.0) for vector in vectors]
    base_square = total(block.base_RC.square()) if block.base_RC is not None else 0.0
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for i, first in enumerate(vectors):
        for j in range(i, len(vectors)):
            products[i, j] = products[j, i] = total(first * vectors[j])
    conflicts, compared = _sign_conflicts(vectors)
    return base_square, products, conflicts, compared, bad, vectors[0].numel()


def _sign_conflicts(vectors: Sequence[Tensor]) -> tuple[int, int]:
    if len(vectors) < 2:
        return 0, 0
    positive = torch.stack([vector > 0 for vector in vectors]).sum(0)
    negative = torch.stack([vector < 0 for vector in vectors]).sum(0)
    compared = int((positive + negative >= 2).sum())
    return int(((positive > 0) & (negative > 0)).sum()), compared


def summed(parts: Sequence[TensorGeometry]) -> tuple[float, Tensor]:
    """(the base's squared norm, the vectors' inner products) over several tensors, scaled to all their elements."""
    square, products = 0.0, torch.zeros(())
    for part in parts:
        scale = part.elements / part.measured if part.measured else 1.0
        square += part.base_square * scale
        products = products + part.products * scale
    return square, products


def cosines(products: Tensor) -> Tensor:
    """[n, n] cosines from inner products; 0 where a vector is 0."""
    norms = products.diagonal().clamp_min(0).sqrt()
    scale = norms[:, None] * norms[None, :]
    return torch.where(scale > 0, products / scale.clamp_min(1e-30), torch.zeros_like(products))
