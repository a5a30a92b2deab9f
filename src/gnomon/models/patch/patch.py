"""A Patch: what to add to some tensors of one model, as a value.

Deltas by Hugging Face tensor name, the identity of the model they were made for, where they came from and what was
measured. Patches add up, scale, negate, compress; `apply` lays one over a checkpoint and `revert` takes it off again,
without touching a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gnomon.errors import PatchError
from gnomon.models import identity
from gnomon.models.patch import deltas as delta_of
from gnomon.models.patch import wrapper as wrapping
from gnomon.models.patch.deltas import Delta, LowRank
from gnomon.models.patch.wrapper import Wrapper

if TYPE_CHECKING:
    from gnomon.models.checkpoint import Checkpoint
    from gnomon.models.patch.overlay import PatchedCheckpoint


WRAPPER = "wrapper:"
"""Before the names of wrapper tensors in a file."""


@dataclass(frozen=True, eq=False)
class Patch:
    """deltas: by tensor name. base: identity of the checkpoint they belong to. metadata: provenance (method,
    parameters, what it was made from), JSON values. report: what was measured, JSON values. attachments: tensors that
    travel in the file and change no weight (what a method must remember to go on later). wrappers: what it does to
    activations (`layers.N.KIND`), where no weight could; such a patch only runs beside the weights.
    """

    deltas: Mapping[str, Delta]
    base: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    attachments: Mapping[str, Tensor] = field(default_factory=dict)
    wrappers: Mapping[str, Wrapper] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("metadata", "report", "attachments"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for name in ("deltas", "wrappers"):
            object.__setattr__(self, name, MappingProxyType(dict(sorted(getattr(self, name).items()))))
        if not self.deltas and not self.wrappers:
            raise PatchError("A patch without deltas changes nothing.")

    # -- files --------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read a patch file. Raises PatchError for a file that is missing, damaged or no patch."""
        from gnomon.models.patch.file import read_patch

        return read_patch(Path(path))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all. The same patch always makes the same bytes."""
        from gnomon.models.patch.file import write_patch

        return write_patch(self, Path(path))

    # -- what it is ---------------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> str:
        """sha256 (hex) over the base, every delta and wrapper; provenance, report and attachments do not count."""
        entries = [
            (name, str(tensor.dtype), tuple(tensor.shape), identity.tensor_digest(tensor))
            for name, tensor in self.tensors().items()
        ]
        shapes = {name: list(delta.shape) for name, delta in self.deltas.items()}
        return identity.derived("deltas", {"tensors": identity.of_tensors(entries), "shapes": shapes}, [self.base])

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it changes something with, as it stands in a file: `NAME.PART`, `wrapper:NAME.PART`."""
        parts: dict[str, Delta | Wrapper] = {**self.deltas, **{WRAPPER + n: w for n, w in self.wrappers.items()}}
        return {f"{name}.{part}": tensor for name, one in parts.items() for part, tensor in one.tensors.items()}

    @property
    def touches(self) -> list[str]:
        """Names of what it changes: tensors and wrapped places."""
        return [*self.deltas, *self.wrappers]

    @property
    def is_low_rank(self) -> bool:
        """Whether every delta is: such a patch can run beside the weights, per request."""
        return all(isinstance(delta, LowRank) for delta in self.deltas.values())

    @property
    def rank(self) -> int | None:
        """The largest rank; None when a delta is not low-rank, or there is none."""
        ranks = [delta.rank for delta in self.deltas.values() if isinstance(delta, LowRank)]
        return max(ranks, default=None) if len(ranks) == len(self.deltas) else None

    @property
    def bytes(self) -> int:
        """Size of the deltas and wrappers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def dense(self, name: str) -> Tensor:
        """One tensor's delta in full, float32. Raises PatchError for a tensor the patch leaves alone."""
        if name not in self.deltas:
            raise PatchError(f"The patch does not touch `{name}`.", hint=f"It touches {_some(self.deltas)}.")
        return self.deltas[name].full()

    def norm(self) -> float:
        """Frobenius norm of all deltas together."""
        return math.hypot(*(delta.norm() for delta in self.deltas.values()))

    def __eq__(self, other: object) -> bool:
        """Same base, same deltas bit for bit."""
        return isinstance(other, Patch) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __repr__(self) -> str:
        kinds = sorted({one.kind for one in (*self.deltas.values(), *self.wrappers.values())})
        return f"<Patch {self.identity[:12]} of {self.base[:12]}: {len(self.touches)} tensors, {', '.join(kinds)}>"

    # -- on a model ---------------------------------------------------------------------------------------------

    def apply(self, checkpoint: Checkpoint, *, any_base: bool = False) -> PatchedCheckpoint:
        """The checkpoint seen through this patch: computed when asked for, the original untouched.

        Raises WrongBase when the patch was made for another model (unless any_base), PatchError when a tensor is
        missing or has another shape, or the patch acts on activations.
        """
        from gnomon.models.patch.overlay import PatchedCheckpoint

        if self.wrappers:
            raise PatchError(
                f"This patch acts on activations ({_some(self.wrappers)}): no weights can hold it.",
                hint="Let it run beside them: --patches FILE, model.with_patches([patch]).",
            )
        return PatchedCheckpoint(checkpoint, self, any_base=any_base)

    def revert(self, checkpoint: Checkpoint) -> Checkpoint:
        """Take this patch off again, wherever it lies in the stack: exact, since nothing was ever overwritten.

        Raises PatchError when the checkpoint does not wear it, or when a patch above it was made for it.
        """
        from gnomon.models.patch.overlay import without

        return without(checkpoint, self)

    # -- algebra ------------------------------------------------------------------------------------------------

    def __add__(self, other: Patch) -> Patch:
        """Both at once. `other` belongs to the same base, or to that base with this patch applied."""
        from gnomon.models.patch.overlay import derived_identity

        if other.base not in (self.base, derived_identity(self, self.base)):
            raise PatchError(
                f"These patches belong to different bases: {self.base[:12]} and {other.base[:12]}.",
                hint="Only changes of one model add up.",
            )
        joined = dict(self.deltas)
        for name, delta in other.deltas.items():
            joined[name] = (
                _named(name, lambda a, b: delta_of.add(a, b), joined[name], delta) if name in joined else delta
            )
        wrappers = dict(self.wrappers)
        for name, one in other.wrappers.items():
            wrappers[name] = wrapping.add(wrappers[name], one) if name in wrappers else one
        return Patch(joined, self.base, {"method": "add", "of": [_origin(self), _origin(other)]}, wrappers=wrappers)

    def __mul__(self, factor: float) -> Patch:
        if not math.isfinite(factor):
            raise PatchError(f"A patch cannot be scaled by {factor}.")
        scaled = {name: delta.scaled(factor) for name, delta in self.deltas.items()}
        wrappers = {name: one.scaled(factor) for name, one in self.wrappers.items()}
        return Patch(scaled, self.base, {"method": "scale", "factor": factor, "of": [_origin(self)]}, wrappers=wrappers)

    __rmul__ = __mul__

    def __neg__(self) -> Patch:
        return self * -1.0

    def __sub__(self, other: Patch) -> Patch:
        return self + -other

    def to_low_rank(self, rank: int | None = None, *, energy: float | None = None) -> Patch:
        """Every delta as its best low-rank approximation, fit to run beside the weights.

        rank: at most this. energy: as few ranks as keep this share of each delta's squared norm. What is lost stands
        in the report, per tensor. Raises PatchError for deltas of vectors (norms, biases), which have no rank.
        """
        if (rank is None) == (energy is None):
            raise PatchError("Give either a rank or an energy.")
        if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
            raise PatchError(
                f"A rank is 1 or above and an energy in (0, 1], not {rank if rank is not None else energy}."
            )
        vectors = [name for name, delta in self.deltas.items() if len(delta.shape) != 2]
        if vectors:
            raise PatchError(
                f"{len(vectors)} deltas are no matrices ({_some(vectors)}) and have no rank.",
                hint="Take them out with only(...), or apply the patch to the weights.",
            )
        small = {name: delta_of.compressed(d, rank=rank, energy=energy) for name, d in self.deltas.items()}
        lost = {name: _lost(self.deltas[name], delta) for name, delta in small.items()}
        how = {"rank": rank} if rank is not None else {"energy": energy}
        metadata = {**self.metadata, "compressed": {**how, "of": self.identity}}
        report = {**self.report, "relative_error": lost}
        return replace(self, deltas=small, metadata=metadata, report=report)

    def only(self, *parts: str) -> Patch:
        """The deltas and wrappers whose name contains one of these parts."""
        kept = {name: delta for name, delta in self.deltas.items() if any(part in name for part in parts)}
        worn = {name: one for name, one in self.wrappers.items() if any(part in name for part in parts)}
        if not kept and not worn:
            raise PatchError(
                f"No delta's name contains {' or '.join(parts)}.", hint=f"There are {_some(self.touches)}."
            )
        return replace(self, deltas=kept, wrappers=worn, metadata={**self.metadata, "only": list(parts)})

    def with_report(self, **values: Any) -> Patch:
        """The same patch with more in its report."""
        return replace(self, report={**self.report, **values})


def _lost(whole: Delta, small: LowRank) -> float:
    """Relative Frobenius error of an approximation."""
    if whole is small:
        return 0.0
    norm = whole.norm()
    return float((whole.full().double() - small.full().double()).norm()) / norm if norm else 0.0


def _origin(patch: Patch) -> dict[str, Any]:
    return {"identity": patch.identity, **patch.metadata}


def _named(name: str, work: Any, *arguments: Any) -> Any:
    try:
        return work(*arguments)
    except PatchError as error:
        raise PatchError(f"`{name}`: {error.message}", hint=error.hint) from None


def _some(names: Any) -> str:
    listed = [f"`{name}`" for name in names]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
