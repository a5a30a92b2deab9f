"""The difference of two models as a LoRA adapter: the best low-rank approximation of each linear module's.

Stands on Patch, which decomposes and exports; what a LoRA cannot hold is named, not dropped in silence.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gnomon.errors import MergeError, PatchError, UsageError
from gnomon.kernels import available_threads
from gnomon.merge.layout import TABLES
from gnomon.merge.parallel import ordered_map
from gnomon.models.checkpoint import Checkpoint, TensorInfo
from gnomon.models.patch import Dense, LowRank, Patch
from gnomon.models.patch.deltas import compressed
from gnomon.models.patch.peft import to_peft
from gnomon.progress import progress


@dataclass(frozen=True)
class Extracted:
    """modules: in the adapter. kept: share of the whole difference's squared norm. left_out: changed, but not held."""

    modules: int
    rank: int
    kept: float
    left_out: tuple[str, ...]


def extract_lora(
    base: Checkpoint,
    tuned: Checkpoint,
    out: Path,
    *,
    max_rank: int = 128,
    energy: float | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> Extracted:
    """Write the adapter. Raises MergeError when the tensors differ in names or shapes or nothing changed, UsageError
    for a wrong option, PatchError for a folder in use.
    """
    _check(base, tuned, out, max_rank, energy)
    wanted, unwanted = _pattern("include", include), _pattern("exclude", exclude)

    def decomposed(name: str) -> tuple[float, LowRank | None]:
        """(squared norm of a tensor's change, what the adapter holds of it)."""
        delta = tuned[name].float() - base[name].float()
        square, module = float(delta.double().square().sum()), name.removesuffix(".weight")
        unchosen = (wanted and not wanted.search(module)) or (unwanted and unwanted.search(module))
        held = None
        if square and not unchosen and _is_linear(name, delta):
            held = compressed(Dense(delta), rank=max_rank, energy=energy)
        bar.advance()
        return square, held

    names = list(base)
    with progress("decomposing", total=len(names)) as bar:
        found = dict(zip(names, ordered_map(decomposed, names, available_threads()), strict=True))
    deltas = {name: held for name, (_, held) in found.items() if held is not None}
    left_out = [name for name, (square, _) in found.items() if square and not _is_linear(name, base.info(name))]
    if not deltas:
        chosen = " that --include and --exclude leave" if include or exclude else ""
        raise MergeError(f"No linear module{chosen} differs between {base.reference} and {tuned.reference}.")
    to_peft(Patch(deltas, base.identity, {"method": "lora-extract"}), out, base_name=base.reference)
    kept = math.fsum(held.norm() ** 2 for held in deltas.values()) / math.fsum(square for square, _ in found.values())
    return Extracted(len(deltas), max(delta.rank for delta in deltas.values()), kept, tuple(left_out))


def _is_linear(name: str, tensor: Tensor | TensorInfo) -> bool:
    return len(tensor.shape) == 2 and name.endswith(".weight") and not any(table in name for table in TABLES)


def _check(base: Checkpoint, tuned: Checkpoint, out: Path, max_rank: int, energy: float | None) -> None:
    """What can be known before anything is read."""
    if max_rank < 1:
        raise UsageError(f"--max-rank must be at least 1, not {max_rank}.", param="max_rank")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy must lie between 0 and 1, not {energy}.", param="energy")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PatchError(f"{out} is not empty.", hint="Give a new directory.")
    for name in dict.fromkeys([*base, *tuned]):
        for model in (base, tuned):
            if name not in model:
                raise MergeError(f"{model.reference} has no tensor `{name}`: the two are different networks.")
        if tuned.info(name).shape != base.info(name).shape:
            shapes = f"{list(base.info(name).shape)} and {list(tuned.info(name).shape)}"
            raise MergeError(f"`{name}` has different shapes in {base.reference} and {tuned.reference}: {shapes}.")


def _pattern(option: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise UsageError(f"--{option}: `{text}` is no regular expression: {error}.", param=option) from None
