"""Where every output tensor will lie: safetensors shards, their headers, and a slot per tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gnomon.models.safetensors_checkpoint import TYPES

if TYPE_CHECKING:
    from gnomon.merge.merged import MergedCheckpoint

SHARD_BYTES = 5_000_000_000
CODES = {name: code for code, name in TYPES.items()}


@dataclass(frozen=True)
class Slot:
    """Where an output tensor goes."""

    name: str
    file: str
    begin: int
    size: int


@dataclass(frozen=True)
class Shard:
    """One output file: its header's bytes, and its whole length."""

    file: str
    header: bytes
    length: int


def lay_out(merged: MergedCheckpoint, shard_bytes: int, name: str) -> tuple[list[Shard], list[Slot]]:
    """The output files, and every tensor's place; depends on the plan and the shard size alone."""
    groups: list[list[tuple[str, int]]] = [[]]
    filled = 0
    for tensor in merged:
        info = merged.info(tensor)
        size = torch.Size(info.shape).numel() * torch.empty(0, dtype=getattr(torch, info.dtype)).element_size()
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((tensor, size))
        filled += size
    shards, slots = [], []
    for number, group in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "gnomon_identity": name}}
        place = 0
        for tensor, size in group:
            info = merged.info(tensor)
            header[tensor] = {
                "dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": [place, place + size],
            }  # fmt: skip
            place += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        for tensor, size in group:
            slots.append(Slot(tensor, file, begin + header[tensor]["data_offsets"][0], size))
        shards.append(Shard(file, len(text).to_bytes(8, "little") + text, begin + place))
    return shards, slots
