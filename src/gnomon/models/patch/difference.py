"""The difference of two checkpoints as a patch: a task vector (arXiv 2212.04089).

Tensor by tensor, so that no more than one pair is held besides the result. Few changed entries become a sparse delta.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gnomon.errors import PatchError
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.patch.deltas import Delta, Dense, Sparse, compressed
from gnomon.models.patch.patch import Patch
from gnomon.progress import progress

SPARSE_BELOW = 0.25
"""Share of changed entries below which a sparse delta (12 bytes an entry) is smaller than a dense one."""


def difference(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rank: int | None = None,
    energy: float | None = None,
    only: Sequence[str] = (),
) -> Patch:
    """What turns `base` into `tuned`.

    rank, energy: compress each matrix as `to_low_rank` does, one at a time; vectors (norms, biases) have no rank and
    are left out, which the report says. only: parts of tensor names. The report's `not_exact` names tensors that
    rounding keeps from coming out bit for bit. Raises PatchError for checkpoints of different shapes, or equal ones.
    """
    names = [name for name in base if not only or any(part in name for part in only)]
    _check_shapes(base, tuned, names)
    deltas: dict[str, Delta] = {}
    left_out: list[str] = []
    not_exact: list[str] = []
    with progress("Comparing", len(names)) as bar:
        for name in names:
            before, after = base[name], tuned[name]
            delta = after.float() - before.float()
            changed = int(delta.count_nonzero())
            if changed and (rank is not None or energy is not None):
                if delta.dim() == 2:
                    deltas[name] = compressed(Dense(delta), rank=rank, energy=energy)
                else:
                    left_out.append(name)
            elif changed:
                deltas[name] = _whole(delta, changed)
                if not torch.equal((before.float() + delta).to(before.dtype), after.to(before.dtype)):
                    not_exact.append(name)
            bar.advance()
    if not deltas:
        raise PatchError(f"{tuned.reference} changes no tensor of {base.reference}", hint=_why_empty(left_out))
    metadata = {"method": "difference", "tuned": tuned.identity, "rank": rank, "energy": energy}
    return Patch(deltas, base.identity, metadata, {"left_out": left_out, "not_exact": not_exact})


def _whole(delta: Tensor, changed: int) -> Delta:
    if changed >= SPARSE_BELOW * delta.numel():
        return Dense(delta)
    flat = delta.reshape(-1)
    indices = flat.nonzero()[:, 0]
    return Sparse(indices, flat[indices], tuple(delta.shape))


def _check_shapes(base: Checkpoint, tuned: Checkpoint, names: Sequence[str]) -> None:
    for name in names:
        if name not in tuned:
            raise PatchError(f"{tuned.reference} lacks the tensor `{name}` of {base.reference}.")
        ours, theirs = tuple(base.info(name).shape), tuple(tuned.info(name).shape)
        if ours != theirs:
            raise PatchError(f"`{name}` is {ours} in {base.reference} and {theirs} in {tuned.reference}.")
    more = [name for name in tuned if name not in base]
    if more:
        raise PatchError(f"{tuned.reference} has `{more[0]}`, which {base.reference} lacks: a patch adds no tensor.")
    if not names:
        raise PatchError("No tensor's name contains what `only` asks for.")


def _why_empty(left_out: Sequence[str]) -> str | None:
    if not left_out:
        return None
    return f"Only vectors differ ({len(left_out)}, e.g. `{left_out[0]}`), and they have no rank: leave rank away."
