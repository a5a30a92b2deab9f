"""What can be said of an ensemble: in a recipe, on the command line, in Python, and (some of it) in a request.

`EnsembleOptions` is the recipe key and the request field; `Policy` is how one request's members are fused, checked and
with normalised weights. Fields that name models are the operator's alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gnomon.capability import OPERATOR_ONLY
from gnomon.ensemble.fusion import MEMBERS_NEEDED, normalised
from gnomon.errors import UsageError

Core = Literal["union", "topk", "byte"]
When = Literal["every", "gate", "entropy", "safe"]
FuseName = Literal["arithmetic", "geometric", "contrastive", "proxy"]


class MemberOptions(BaseModel):
    """One member, spelt out."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(description="Model reference.")]
    weight: Annotated[float | None, Field(description="Its vote; all are normalised to sum to one.")] = None
    name: Annotated[str | None, Field(description="Its name in votes and usage; default: the model's.")] = None
    primary: Annotated[bool, Field(description="Speaks alone when a gate is shut.")] = False
    profile: Annotated[str | None, Field(description="Numeric profile of this member.")] = None
    chat_template: Annotated[str | None, Field(description="Path of a Jinja chat template for this member.")] = None


class EnsembleOptions(BaseModel):
    """Several models, one distribution."""

    model_config = ConfigDict(extra="forbid")

    members: Annotated[
        list[str | MemberOptions] | None, OPERATOR_ONLY, Field(description="Model references, in order.")
    ] = None
    core: Annotated[Core | None, OPERATOR_ONLY, Field(description="union (default) | topk | byte.")] = None
    mode: Annotated[
        Literal["canonical", "beam"], OPERATOR_ONLY, Field(description="Byte core: canonical covers only, or a beam.")
    ] = "canonical"
    top: Annotated[int, OPERATOR_ONLY, Field(ge=1, description="topk core: candidates of each member.")] = 10
    beam: Annotated[int, OPERATOR_ONLY, Field(ge=1, description="Byte core: covers kept per member.")] = 8
    prune: Annotated[
        float, OPERATOR_ONLY, Field(ge=0, lt=1, description="Byte core: covers below this share are dropped.")
    ] = 1e-3
    renormalize: Annotated[
        bool, OPERATOR_ONLY, Field(description="Members' mass on symbols that cannot be said is given to the others.")
    ] = True
    on_failure: Annotated[
        Literal["fail", "continue"], OPERATOR_ONLY, Field(description="When a member fails: end, or go on without it.")
    ] = "fail"
    weights: Annotated[list[float] | None, Field(description="One vote per member; normalised.")] = None
    fuse: Annotated[FuseName, Field(description="arithmetic | geometric | contrastive | proxy.")] = "arithmetic"
    when: Annotated[
        When, Field(description="every token, or only where the primary is unsure: gate | entropy | safe.")
    ] = "every"
    primary: Annotated[str | int | None, Field(description="Name or number of the member that leads.")] = None
    threshold: Annotated[
        float | None, Field(description="gate: fuse where the primary's best probability is below; entropy: above.")
    ] = None
    alpha: Annotated[float, Field(ge=0, description="Strength of contrastive and proxy.")] = 1.0
    plausible: Annotated[float, Field(gt=0, le=1, description="contrastive: least share of the best probability.")] = (
        0.1
    )
    weigh: Annotated[
        Literal["given", "perplexity"],
        Field(description="perplexity: weights of each request from how well its prompt suits each member."),
    ] = "given"
    sharpness: Annotated[float, Field(gt=0, description="weigh: perplexity: how much a better fit counts.")] = 1.0
    trace: Annotated[
        bool, Field(description="Votes of every member beside the log-probabilities, where asked for.")
    ] = True


@dataclass(frozen=True)
class Policy:
    """How members are fused: normalised weights, primary as a place."""

    weights: tuple[float, ...]
    fuse: FuseName = "arithmetic"
    when: When = "every"
    primary: int = 0
    threshold: float = 0.0
    alpha: float = 1.0
    plausible: float = 0.1

    @classmethod
    def of(cls, options: EnsembleOptions, names: Sequence[str], weights: Sequence[float] | None = None) -> Policy:
        """Checked. weights: used where the options give none. Raises UsageError naming the field."""
        given = options.weights if options.weights is not None else weights
        checked = normalised(given, len(names))
        needed = MEMBERS_NEEDED.get(options.fuse)
        if needed is not None and len(names) != needed:
            raise UsageError(
                f"`fuse: {options.fuse}` needs {needed} members, in order; there are {len(names)}.",
                param="ensemble.fuse",
            )
        threshold = options.threshold
        gated = options.when in ("gate", "entropy")
        if gated and threshold is None:
            raise UsageError(
                f"`when: {options.when}` needs a threshold.",
                hint="gate: a probability such as 0.5; entropy: nats such as 2.0. Find one: gnomon ensemble sweep",
                param="ensemble.threshold",
            )
        if threshold is not None:
            if not gated:
                raise UsageError("A threshold needs `when: gate` or `when: entropy`.", param="ensemble.threshold")
            most = 1.0 if options.when == "gate" else math.inf
            if not 0 <= threshold <= most:
                raise UsageError(f"The threshold {threshold} is out of range.", param="ensemble.threshold")
        if options.when == "safe" and options.fuse in MEMBERS_NEEDED:
            raise UsageError(
                f"`fuse: {options.fuse}` needs all its members at every token; `when: safe` leaves some out.",
                param="ensemble.when",
            )
        return cls(
            tuple(checked),
            options.fuse,
            options.when,
            _place(options.primary, names),
            threshold or 0.0,
            options.alpha,
            options.plausible,
        )


def _place(primary: str | int | None, names: Sequence[str]) -> int:
    """The primary's place; the first member leads when nobody is named."""
    if primary is None:
        return 0
    if isinstance(primary, int):
        if not 0 <= primary < len(names):
            raise UsageError(f"There is no member number {primary}.", param="ensemble.primary")
        return primary
    if primary not in names:
        raise UsageError(
            f"No member is called `{primary}`.", hint=f"Members: {', '.join(names)}.", param="ensemble.primary"
        )
    return list(names).index(primary)


def parse(text: str) -> Any:
    """The short form on the command line: a fusion's name."""
    if text in ("arithmetic", "geometric", "contrastive", "proxy"):
        return {"fuse": text}
    raise UsageError(f"--ensemble {text}: not understood.", hint="JSON, @file, or a fusion's name.", param="ensemble")
