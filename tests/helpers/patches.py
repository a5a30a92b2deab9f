"""Random patches for tiny models."""

from __future__ import annotations

import torch

from gnomon.models.checkpoint import Checkpoint
from gnomon.models.patch import LowRank, Patch

PROJECTIONS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
TOP = ("model.embed_tokens.weight", "lm_head.weight")


def random_patch(
    checkpoint: Checkpoint, seed: int, rank: int = 3, size: float = 0.3, parts: tuple[str, ...] = ()
) -> Patch:
    """Low-rank deltas of every projection, embedding and head (or of the named parts)."""
    g = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in checkpoint:
        if name not in TOP and not any(f"{part}.weight" in name for part in PROJECTIONS):
            continue
        if parts and not any(part in name for part in parts):
            continue
        rows, columns = checkpoint.info(name).shape
        up = torch.randn(rows, rank, generator=g) * size
        down = torch.randn(rank, columns, generator=g) * (size / columns**0.5)
        deltas[name] = LowRank(up * (columns**0.5 if name == TOP[0] else 1), down)
    return Patch(deltas, checkpoint.identity)
