"""PEFT LoRA directories and patches, in both directions.

An adapter does not say which weights it was trained on, so the checkpoint it is given becomes its base. Scales are
folded into `up`; what is exported has scale 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gnomon.errors import PatchError
from gnomon.models.cache import atomic_write
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.lora import PREFIX, LoraCheckpoint
from gnomon.models.patch.deltas import Delta, LowRank
from gnomon.models.patch.patch import Patch

if TYPE_CHECKING:
    from collections.abc import Mapping

_HINT = "Make it low-rank first, of linear modules alone: gnomon patch compress --rank N --only proj."
LOOKED_UP = ("embed_tokens", "wte", "wpe")


def from_peft(folder: Path, checkpoint: Checkpoint) -> Patch:
    """Raises CheckpointError for what is no LoRA directory or fits nothing, UnsupportedModel for other adapters."""
    adapter = LoraCheckpoint(checkpoint, folder)
    deltas: dict[str, Delta] = {name: LowRank(*adapter.factors(name)) for name in adapter.targets}
    kept = {key: adapter.adapter.get(key) for key in ("r", "lora_alpha", "use_rslora", "base_model_name_or_path")}
    return Patch(deltas, checkpoint.identity, {"method": "lora", "adapter": folder.resolve().name, **kept})


def to_peft(patch: Patch, folder: Path, *, base_name: str | None = None) -> Path:
    """Write adapter_config.json and adapter_model.safetensors into a new directory.

    Raises PatchError for deltas that PEFT's LoRA cannot hold: not low-rank, or of an embedding.
    """
    from safetensors.torch import save

    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    if patch.wrappers:
        raise PatchError(f"A PEFT LoRA cannot hold what acts on activations ({next(iter(patch.wrappers))}).")
    for name, delta in patch.deltas.items():
        module = name.removesuffix(".weight")
        if not isinstance(delta, LowRank) or not name.endswith(".weight") or module.endswith(LOOKED_UP):
            what = delta.kind if not isinstance(delta, LowRank) else "no linear module's"
            raise PatchError(f"PEFT's LoRA cannot hold the delta of `{name}`: it is {what}.", hint=_HINT)
        ranks[module] = delta.rank
        tensors[f"{PREFIX}{module}.lora_A.weight"] = delta.down.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = delta.up.contiguous()
    if folder.exists() and any(folder.iterdir()):
        raise PatchError(f"{folder} is not empty.", hint="Give a new directory.")
    with atomic_write(folder / "adapter_model.safetensors") as out:
        out.write(save(tensors, {"format": "pt"}))
    with atomic_write(folder / "adapter_config.json") as out:
        out.write(json.dumps(_config(ranks, base_name), indent=2).encode())
    return folder


def _config(ranks: Mapping[str, int], base_name: str | None) -> dict[str, Any]:
    rank = max(ranks.values())
    others = {module: own for module, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
