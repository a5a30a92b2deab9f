"""Identity: what a checkpoint IS, as one sha256, so that patches, caches and fingerprints can name it.

A file's identity hashes every tensor's bytes; since that reads the whole file, it is cached by path, size and
modification time. A derived checkpoint hashes its operation and its inputs' identities, without materialising it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnomon.models.cache import atomic_write, cache_dir

if TYPE_CHECKING:
    from torch import Tensor

Entry = tuple[str, str, tuple[int, ...], str]
"""name, dtype, shape, sha256 of the tensor's bytes."""


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, as they lie."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def of_tensors(entries: Iterable[Entry]) -> str:
    """Identity of a checkpoint that lies in files."""
    lines = sorted(json.dumps([name, dtype, list(shape), digest]) for name, dtype, shape, digest in entries)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def derived(operation: str, parameters: Mapping[str, Any], inputs: Iterable[str], version: int = 1) -> str:
    """Identity of a checkpoint computed from others."""
    canonical = json.dumps([operation, version, dict(parameters), list(inputs)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def cached(files: Iterable[Path], compute: Callable[[], str]) -> str:
    """compute(), remembered for as long as the files keep path, size and modification time."""
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(states).encode()).hexdigest()
    record = cache_dir() / "identity" / key
    try:
        known = record.read_text().strip()
        if len(known) == 64:
            return known
    except OSError:
        known = ""
    identity = compute()
    try:
        with atomic_write(record) as out:
            out.write(identity.encode())
    except OSError:
        return identity  # a read-only cache costs a rehash next time, nothing else
    return identity
