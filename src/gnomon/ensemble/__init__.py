"""Several models, one distribution, whatever their vocabularies.

from gnomon.ensemble import Ensemble
both = Ensemble(["smollm2-135m-instruct", "gemma-3-270m"])
print(both.generate("The capital of France is").text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gnomon.capability import Capability

if TYPE_CHECKING:
    from gnomon.ensemble.ensemble import Ensemble

__all__ = ["ENSEMBLE", "Ensemble"]

ENSEMBLE = Capability(
    name="ensemble",
    help="Several models, one distribution.",
    options="gnomon.ensemble.options:EnsembleOptions",
    runner="gnomon.ensemble.ensemble:Ensemble",
    resolver="gnomon.ensemble.resolving:resolve",
    commands="gnomon.cli.ensemble:app",
    parse="gnomon.ensemble.options:parse",
    conflicts=(("patches", "a patch belongs to one member: name it in that member's reference, BASE+PATCH."),),
)


def __getattr__(name: str) -> Any:
    if name != "Ensemble":
        raise AttributeError(f"module 'gnomon.ensemble' has no attribute {name!r}")
    from gnomon.ensemble.ensemble import Ensemble

    return Ensemble
