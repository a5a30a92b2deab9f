"""A patch as one safetensors file: `NAME.up`, `NAME.down`, `NAME.indices`, `NAME.values`, `NAME.delta` per tensor,
`wrapper:layers.N.KIND.PART` per wrapper, and one JSON header entry `gnomon.patch` with the rest. Written whole or not
at all; read with every digest checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gnomon.errors import CheckpointError, PatchError, UnsupportedModel
from gnomon.models import identity
from gnomon.models.cache import atomic_write
from gnomon.models.patch.deltas import Delta, from_parts
from gnomon.models.patch.wrapper import by_name
from gnomon.models.safetensors_checkpoint import read_header

if TYPE_CHECKING:
    from gnomon.models.patch.patch import Patch

KEY = "gnomon.patch"
SCHEMA = "gnomon.patch/1"
ATTACHMENT = "attachment:"
SUFFIX = ".patch.safetensors"


def write_patch(patch: Patch, path: Path) -> Path:
    """Raises PatchError for provenance that is not JSON, OSError when the disk refuses."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in patch.tensors().items()}
    tensors |= {ATTACHMENT + name: tensor.detach().contiguous() for name, tensor in patch.attachments.items()}
    about = {
        "schema": SCHEMA,
        "base": patch.base,
        "identity": patch.identity,
        "content": _content(tensors),
        "shapes": {name: list(delta.shape) for name, delta in patch.deltas.items()},
        "metadata": dict(patch.metadata),
        "report": dict(patch.report),
    }
    try:
        header = json.dumps(about, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PatchError(f"The patch's metadata or report cannot be written as JSON: {error}.") from None
    with atomic_write(path) as out:
        out.write(save(tensors, {KEY: header}))
    return path


def is_patch_file(path: Path) -> bool:
    """Whether a file says that it is a patch; False for anything else, damaged files included."""
    try:
        return KEY in _metadata(path)
    except PatchError:
        return False


def read_patch(path: Path) -> Patch:
    from safetensors.torch import load_file

    from gnomon.models.patch.patch import WRAPPER, Patch

    about = _about(path)
    tensors = load_file(path)
    if _content(tensors) != about.get("content"):
        raise PatchError(f"{path} is damaged: its content is not what its header says.", hint="Fetch or make it again.")
    attachments = {name.removeprefix(ATTACHMENT): t for name, t in tensors.items() if name.startswith(ATTACHMENT)}
    wrapped = {name.removeprefix(WRAPPER): t for name, t in tensors.items() if name.startswith(WRAPPER)}
    added = {name: t for name, t in tensors.items() if not name.startswith((ATTACHMENT, WRAPPER))}
    try:
        wrappers = {name: by_name(name, parts) for name, parts in _parts(wrapped).items()}
    except PatchError as error:
        raise PatchError(f"{path}: {error.message}", hint=error.hint) from None
    patch = Patch(
        _deltas(path, added, about["shapes"]), about["base"], about["metadata"], about["report"], attachments, wrappers
    )
    if patch.identity != about["identity"]:
        raise PatchError(f"{path} is damaged: its identity is not the one in its header.")
    return patch


def _about(path: Path) -> dict[str, Any]:
    text = _metadata(path).get(KEY)
    if text is None:
        raise PatchError(
            f"{path} is no patch: its header has no `{KEY}`.",
            hint="A PEFT adapter becomes one with `gnomon patch create BASE ADAPTER_DIR`.",
        )
    try:
        about = json.loads(text)
    except ValueError as error:
        raise PatchError(f"{path}: the header `{KEY}` is damaged: {error}.") from None
    if not isinstance(about, dict) or about.get("schema") != SCHEMA:
        raise PatchError(f"{path} has a schema that this version does not know; it reads {SCHEMA}.")
    for key, kind in (("base", str), ("identity", str), ("shapes", dict), ("metadata", dict), ("report", dict)):
        if not isinstance(about.get(key), kind):
            raise PatchError(f"{path}: the header lacks `{key}`.")
    return about


def _metadata(path: Path) -> dict[str, str]:
    """The safetensors header's own key-value pairs, after its table of contents was checked."""
    from safetensors import SafetensorError, safe_open

    try:
        read_header(path)
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except OSError as error:
        raise PatchError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (CheckpointError, UnsupportedModel, SafetensorError) as error:
        raise PatchError(f"{path} is no sound safetensors file: {error}") from None


def _deltas(path: Path, tensors: dict[str, Tensor], shapes: dict[str, list[int]]) -> dict[str, Delta]:
    deltas: dict[str, Delta] = {}
    for name, found in _parts(tensors).items():
        try:
            deltas[name] = from_parts(found, tuple(shapes[name]) if name in shapes else None)
        except PatchError as error:
            raise PatchError(f"{path}: `{name}`: {error.message}", hint=error.hint) from None
    return deltas


def _parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`NAME.PART` -> tensors by name, then by part."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        parts.setdefault(name, {})[part] = tensor
    return parts


def _content(tensors: dict[str, Tensor]) -> str:
    return identity.of_tensors(
        (name, str(tensor.dtype), tuple(tensor.shape), identity.tensor_digest(tensor))
        for name, tensor in tensors.items()
    )
