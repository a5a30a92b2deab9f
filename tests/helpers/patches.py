"""Random patches for tiny models."""

from __future__ import annotations

import torch

from gnomon.models.checkpoint import Checkpoint
from gnomon.models.patch import LowRank, Patch, Wrapper

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


def random_wrappers(config: dict[str, int], seed: int, layers: tuple[int, ...] = (1, 2)) -> dict[str, Wrapper]:
    """Every kind of wrapper, gated neurons too; sizes by a model's config."""
    g = torch.Generator().manual_seed(seed)
    c, m = config["hidden_size"], config["intermediate_size"]

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * size

    found: dict[str, Wrapper] = {}
    for place, layer in enumerate(layers):
        neurons = {"key": normal(7, c, size=0.3), "bias": normal(7), "value": normal(7, c)}
        if place % 2:
            neurons["gate"] = normal(7, c, size=0.3)
        radius = torch.full((5,), (2.0 * c) ** 0.5)  # about the distance of two random rows of unit RMS
        for one in (
            Wrapper("neurons", layer, neurons),
            Wrapper("codebook", layer, {"key": normal(5, c), "radius": radius, "value": normal(5, c)}),
            Wrapper("routed", layer, {"up": normal(c, 3), "down": normal(3, m), "threshold": torch.tensor([0.5])}),
            Wrapper("affine", layer, {"left": normal(c, 2, size=0.3), "right": normal(2, c), "bias": normal(c)}),
        ):
            found[one.name] = one
    return found
