"""The difference of two models as a LoRA adapter: the best low-rank approximation of each linear module's.

Stands on Patch, which decomposes and exports; what a LoRA cannot hold is named, not dropped in silence.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from gnomon.errors import MergeError
from gnomon.merge.layout import TABLES
from gnomon.models.checkpoint import Checkpoint
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
    """Write the adapter. Raises MergeError when shapes differ or nothing changed, PatchError for a folder in use."""
    deltas: dict[str, LowRank] = {}
    left_out, all_squares, kept_squares = [], [], []
    with progress("decomposing", total=len(base)) as bar:
        for name in base:
            bar.advance()
            if name not in tuned or tuned.info(name).shape != base.info(name).shape:
                raise MergeError(f"`{name}` is missing in {tuned.reference} or has another shape there.")
            delta = tuned[name].float() - base[name].float()
            square = float(delta.double().square().sum())
            if square == 0:
                continue
            all_squares.append(square)
            module = name.removesuffix(".weight")
            holds = delta.dim() == 2 and name.endswith(".weight") and not any(table in name for table in TABLES)
            if not holds:
                left_out.append(name)
                continue
            if (include and not re.search(include, module)) or (exclude and re.search(exclude, module)):
                continue
            deltas[name] = compressed(Dense(delta), rank=max_rank, energy=energy)
            kept_squares.append(deltas[name].norm() ** 2)
    if not deltas:
        raise MergeError(f"No linear module differs between {base.reference} and {tuned.reference}.")
    to_peft(Patch(deltas, base.identity, {"method": "lora-extract"}), out, base_name=base.reference)
    kept = math.fsum(kept_squares) / math.fsum(all_squares)
    return Extracted(len(deltas), max(delta.rank for delta in deltas.values()), kept, tuple(left_out))
