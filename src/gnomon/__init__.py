"""gnomon: improve open-weight language models at every seam between weights and text.

    import gnomon
    model = gnomon.load()
    print(model.chat("What is the capital of France?").text)

Everything is imported on first use: `import gnomon` itself is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gnomon.version import __version__

if TYPE_CHECKING:
    from gnomon.client import LocalClient, RemoteClient
    from gnomon.errors import GnomonError
    from gnomon.generation import Chunk, Generation, Score
    from gnomon.loading import load
    from gnomon.model import Model
    from gnomon.models.patch import Patch

__all__ = [
    "Chunk",
    "Generation",
    "GnomonError",
    "LocalClient",
    "Model",
    "Patch",
    "RemoteClient",
    "Score",
    "__version__",
    "load",
]

_HOMES = {
    "load": "gnomon.loading",
    "Model": "gnomon.model",
    "Generation": "gnomon.generation",
    "Chunk": "gnomon.generation",
    "Score": "gnomon.generation",
    "GnomonError": "gnomon.errors",
    "LocalClient": "gnomon.client",
    "Patch": "gnomon.models.patch",
    "RemoteClient": "gnomon.client",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gnomon' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
