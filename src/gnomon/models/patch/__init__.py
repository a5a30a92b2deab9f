"""Patch: the unit of weight change. Edits, LoRA adapters, task vectors and learned updates are patches."""

from gnomon.models.patch.deltas import Delta, Dense, LowRank, Sparse
from gnomon.models.patch.overlay import PatchedCheckpoint
from gnomon.models.patch.patch import Patch
from gnomon.models.patch.wrapper import Wrapper

__all__ = ["Delta", "Dense", "LowRank", "Patch", "PatchedCheckpoint", "Sparse", "Wrapper"]
