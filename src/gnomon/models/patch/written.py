"""A patch written into a model directory, and taken out again bit for bit.

Before a weight file changes, the original bytes of every tensor to be changed are kept in `undo/`; weight files are
replaced whole. A process killed at any moment leaves a directory that `revert_directory` restores exactly.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gnomon.errors import PatchError
from gnomon.models import identity
from gnomon.models.cache import atomic_write
from gnomon.models.patch.patch import Patch
from gnomon.models.safetensors_checkpoint import DirectoryCheckpoint, read_header

KEY = "gnomon.undo"


def apply_to_directory(patch: Patch, folder: Path, out: Path | None = None, *, any_base: bool = False) -> Path:
    """Add the patch to the weights of a safetensors model directory, in place or in a copy `out` that must not exist.

    Returns the undo file. Raises WrongBase, PatchError, CheckpointError before anything is written.
    """
    if out is not None:
        patch.apply(DirectoryCheckpoint(folder), any_base=any_base)
        return _apply_to_copy(patch, folder, out, any_base)
    checkpoint = DirectoryCheckpoint(folder)
    patched = patch.apply(checkpoint, any_base=any_base)
    before = {name: checkpoint[name] for name in patch.deltas}
    after = {name: patched[name] for name in patch.deltas}
    undo = _next_undo(folder)
    about = {
        "patch": patch.identity,
        "before": checkpoint.identity,
        "patched": {name: identity.tensor_digest(tensor) for name, tensor in after.items()},
    }
    _write_undo(undo, before, about)
    _replace_tensors(checkpoint, after)
    return undo


def revert_directory(folder: Path) -> str:
    """Undo the last patch that was applied, or half applied -> the identity of the restored model.

    Raises PatchError when there is nothing to undo, or when a weight was changed by something else since.
    """
    undos = sorted((folder / "undo").glob("*.safetensors"))
    if not undos:
        raise PatchError(f"{folder} keeps no undo file: nothing was applied to it.")
    before, about = _read_undo(undos[-1])
    checkpoint = DirectoryCheckpoint(folder)
    for name, tensor in before.items():
        now = identity.tensor_digest(checkpoint[name]) if name in checkpoint else None
        if now not in (about["patched"][name], identity.tensor_digest(tensor)):
            raise PatchError(f"{folder}: `{name}` was changed after the patch; reverting would lose that change.")
    _replace_tensors(checkpoint, before)
    restored = DirectoryCheckpoint(folder).identity
    if restored != about["before"]:
        raise PatchError(f"{folder} is {restored[:12]} again, not {about['before'][:12]}: other tensors were changed.")
    undos[-1].unlink()
    if not any((folder / "undo").iterdir()):
        (folder / "undo").rmdir()
    return restored


def _apply_to_copy(patch: Patch, folder: Path, out: Path, any_base: bool) -> Path:
    if out.exists():
        raise PatchError(f"{out} exists already.", hint="Give a new directory, or apply in place.")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shutil.copytree(folder, partial, ignore=shutil.ignore_patterns("undo"))
        undo = apply_to_directory(patch, partial, any_base=any_base)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out / "undo" / undo.name


def _replace_tensors(checkpoint: DirectoryCheckpoint, tensors: Mapping[str, Tensor]) -> None:
    """Give tensors new bytes of the same type and shape: each weight file is copied, changed and renamed into place."""
    for file in checkpoint.files:
        stored = {name: where for name, where in read_header(file).items() if name in tensors}
        if not stored:
            continue
        with atomic_write(file) as out:
            with file.open("rb") as source:
                shutil.copyfileobj(source, out, 16 << 20)
            for name, where in stored.items():
                out.seek(where.begin)
                out.write(_bytes(tensors[name]))
            out.seek(0, os.SEEK_END)
    checkpoint.close()


def _bytes(tensor: Tensor) -> bytes:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _next_undo(folder: Path) -> Path:
    numbers = [int(path.stem) for path in (folder / "undo").glob("*.safetensors") if path.stem.isdigit()]
    return folder / "undo" / f"{max(numbers, default=0) + 1:04}.safetensors"


def _write_undo(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    plain = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_write(path) as out:
        out.write(save(plain, {KEY: json.dumps(about, sort_keys=True)}))


def _read_undo(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        read_header(path)
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
        return load_file(path), about
    except (KeyError, ValueError, SafetensorError) as error:
        raise PatchError(f"The undo file {path} is damaged: {error}.") from None
