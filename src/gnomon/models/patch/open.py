"""A patch from a path: a patch file, or a PEFT LoRA directory seen as a patch of a given checkpoint."""

from __future__ import annotations

from pathlib import Path

from gnomon.errors import PatchError
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.patch.patch import Patch


def open_patch(path: Path, checkpoint: Checkpoint) -> Patch:
    """Raises PatchError for a path that holds no patch; CheckpointError for an adapter of another network."""
    path = path.expanduser()
    if path.is_dir():
        from gnomon.models.patch.peft import from_peft

        return from_peft(path, checkpoint)
    if not path.exists():
        raise PatchError(f"No patch file `{path}`.", param="patches")
    return Patch.load(path)
