"""Found values, kept: a batch of many facts can be interrupted and goes on where it stopped.

Kept by everything that the search depends on: the weights, the fact, the layer and the options.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gnomon.models.cache import atomic_write, cache_dir

if TYPE_CHECKING:
    from gnomon.edit.editor import Editor
    from gnomon.edit.facts import Fact
    from gnomon.edit.registry import SearchOptions

VERSION = 2
SEARCH = ("prefixes", "frames", "chat", "steps", "rate", "relative", "clamp", "kl", "decay", "stop")


def remembered(
    editor: Editor,
    fact: Fact,
    layer: int,
    options: SearchOptions,
    find: Callable[[], tuple[Tensor, dict[str, Any]]],
) -> tuple[Tensor, dict[str, Any]]:
    """find(), or what it gave before for the same weights, fact, layer and options."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

    path = cache_dir() / "edit" / "values" / f"{_key(editor, fact, layer, options)}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("value"), json.loads((file.metadata() or {})["note"])
    except (OSError, SafetensorError, KeyError, ValueError):
        value, note = find()
    with atomic_write(path) as out:
        out.write(save({"value": value.contiguous()}, {"note": json.dumps(note)}))
    return value, note


def _key(editor: Editor, fact: Fact, layer: int, options: SearchOptions) -> str:
    worn = [patch.identity for patch in editor.standing]
    parts: dict[str, Any] = {name: getattr(options, name) for name in SEARCH}
    parts |= {
        "version": VERSION,
        "weights": editor.model.fingerprint,
        "worn": worn,
        "layer": layer,
        "kind": type(options).__name__,
    }
    parts |= {"prompt": fact.prompt, "subject": fact.subject, "target": fact.target, "at": fact.occurrence}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
