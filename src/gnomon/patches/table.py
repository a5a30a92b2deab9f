"""The table of patches that the operator loaded, laid out to run beside a model's weights.

A request names patches; it never makes the table read a file. A patch may come and go while requests run: a request
keeps what it began with. Knows nothing of engines beyond what a network lays out for it.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gnomon.errors import PatchError, PatchNotFound, UsageError
from gnomon.kernels.side import SidePath
from gnomon.models.cache import atomic_write, cache_dir
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.patch import LowRank, Patch, PatchedCheckpoint, Wrapper
from gnomon.models.patch.file import SUFFIX
from gnomon.models.patch.open import open_patch
from gnomon.models.patch.overlay import check_fits
from gnomon.registry import nearest

log = logging.getLogger("gnomon.patches")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
IDENTITY = re.compile(r"[0-9a-f]{64}")


class Layout(Protocol):
    """What the table needs of a network."""

    def side_path(self, factors: dict[str, Any], wrappers: Mapping[str, Wrapper]) -> SidePath: ...


@dataclass(frozen=True, eq=False)
class Laid:
    """A patch laid out beside a network. source: the file or directory it came from."""

    name: str
    patch: Patch
    side: SidePath
    source: str | None = None
    added: float = 0.0

    @property
    def identity(self) -> str:
        return self.patch.identity

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "id": self.name,
            "object": "patch",
            "identity": self.identity,
            "base": self.patch.base,
            "tensors": len(self.patch.touches),
            "rank": self.patch.rank,
            "bytes": self.patch.bytes,
            "created": int(self.added),
            "method": self.patch.metadata.get("method"),
        }


class PatchTable:
    """The patches of one model, by name. Thread-safe."""

    def __init__(self, checkpoint: Checkpoint, network: Layout) -> None:
        self.checkpoint = checkpoint
        self._network = network
        self._by_name: dict[str, Laid] = {}
        self._in_use: weakref.WeakValueDictionary[str, Laid] = weakref.WeakValueDictionary()  # by identity
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Laid]:
        with self._lock:
            return iter(list(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def add(self, name: str, patch: Patch | str | Path) -> Laid:
        """Load a patch under a name, from a value, a patch file or a PEFT LoRA directory.

        Raises UsageError for a name that is malformed or taken, WrongBase or PatchError for a patch that does not fit
        or cannot run beside the weights.
        """
        if not NAME.fullmatch(name) or IDENTITY.fullmatch(name):
            raise UsageError(
                f"`{name[:100]}` is no name for a patch: letters, digits, `.`, `_` and `-`, at most 100.", param="name"
            )
        laid = self.lay(patch, name)
        with self._lock:
            if (known := self._by_name.get(name)) is not None:
                if known.identity == laid.identity:
                    return known
                raise UsageError(f"The name `{name}` is taken by another patch.", hint="Remove it first.", param="name")
            self._by_name[name] = laid
        return laid

    def remove(self, name: str) -> Laid:
        """Forget a name; requests that began with the patch end with it. Raises PatchNotFound."""
        with self._lock:
            if name not in self._by_name:
                raise self._unknown(name)
            return self._by_name.pop(name)

    def lay(self, patch: Patch | str | Path, name: str | None = None, below: Iterable[Laid] = ()) -> Laid:
        """A patch ready to run, without a place in the table. below: patches that it is stacked on.

        Raises WrongBase, PatchError.
        """
        source = None if isinstance(patch, Patch) else str(patch)
        loaded = patch if isinstance(patch, Patch) else open_patch(Path(patch), self.checkpoint)
        under = self.checkpoint
        for other in below:
            under = PatchedCheckpoint(under, other.patch, any_base=True)
        check_fits(loaded, under)
        if source is not None:
            _remember(loaded.identity, Path(source))
        with self._lock:
            twin = self._in_use.get(loaded.identity)
            side = twin.side if twin is not None else self._network.side_path(_factors(loaded), loaded.wrappers)
            laid = Laid(name or loaded.identity[:12], loaded, side, source, time.time())
            self._in_use[loaded.identity] = laid
        return laid

    def find(self, entry: str, *, trusted: bool) -> Laid:
        """The patch of this name or identity. trusted: the operator asks, who may also name a file or directory.

        Raises PatchNotFound; for the operator also what `lay` raises.
        """
        with self._lock:
            known = next((laid for laid in self._by_name.values() if entry in (laid.name, laid.identity)), None)
            known = known or (self._in_use.get(entry) if trusted else None)
        if known is not None:
            return known
        if trusted and IDENTITY.fullmatch(entry):
            return self._recall(entry)
        if trusted and (entry.endswith(".safetensors") or Path(entry).is_dir()):
            return self.lay(entry)
        raise self._unknown(entry, trusted=trusted)

    def preload(self, entries: Iterable[str]) -> list[str]:
        """The operator's own defaults, files among them, loaded once -> their names."""
        return [self._preloaded(entry) for entry in entries]

    def _preloaded(self, entry: str) -> str:
        laid = self.find(entry, trusted=True)
        if entry in self:
            return entry
        name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(entry).name.removesuffix(SUFFIX).removesuffix(".safetensors"))
        return self.add(name.lstrip("._-") or laid.name, laid.source or laid.patch).name

    def _recall(self, identity: str) -> Laid:
        """A patch by identity, from where it was last loaded: how a replay finds it."""
        try:
            source = Path(json.loads(_record(identity).read_text(encoding="utf-8"))["path"])
        except (OSError, ValueError, KeyError):
            raise PatchNotFound(f"The patch {identity[:12]} is not known on this machine.", param="patches") from None
        laid = self.lay(source)
        if laid.identity != identity:
            raise PatchNotFound(
                f"{source} held the patch {identity[:12]}; now it holds {laid.identity[:12]}.", param="patches"
            )
        return laid

    def _unknown(self, name: str, *, trusted: bool = False) -> PatchNotFound:
        hint = nearest(name, self._by_name) if self._by_name else "There is none."
        if trusted:
            hint += " A file or directory works too: NAME.patch.safetensors, or a PEFT LoRA directory."
        return PatchNotFound(f"No patch `{name[:100]}` is loaded.", hint=hint, param="patches")


def _factors(patch: Patch) -> dict[str, Any]:
    factors: dict[str, Any] = {}
    for name, delta in patch.deltas.items():
        if not isinstance(delta, LowRank):
            raise PatchError(
                f"The delta of `{name}` is {delta.kind}: only low-rank patches can run beside the weights.",
                hint="Compress it: `gnomon patch compress FILE -o OUT --rank N` (Patch.to_low_rank), or apply it to "
                "the weights: `MODEL+FILE.patch.safetensors` as the model reference.",
            )
        factors[name] = (delta.up, delta.down)
    return factors


def _record(identity: str) -> Path:
    return cache_dir() / "patches" / f"{identity}.json"


def _remember(identity: str, source: Path) -> None:
    """Where a patch was loaded from, so that a generation of the ledger can be made again."""
    try:
        with atomic_write(_record(identity)) as out:
            out.write(json.dumps({"path": str(source.resolve())}).encode())
    except OSError as error:
        log.debug("the place of patch %s is not remembered: %s", identity[:12], error)
