"""Members as they are named: opening them, telling them apart, and the reference that opens the ensemble again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gnomon.ensemble.options import EnsembleOptions, MemberOptions, Policy
from gnomon.errors import ConfigError, UsageError
from gnomon.loading import load
from gnomon.model import Model
from gnomon.registry import option_error

log = logging.getLogger("gnomon.ensemble")
MemberLike = str | Path | Model | MemberOptions


def check_options(values: Mapping[str, Any]) -> EnsembleOptions:
    """Keywords as options. Raises UsageError with the field's path."""
    try:
        return EnsembleOptions.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise option_error(error, ("ensemble",)) from None


def open_member(entry: str | Path | MemberOptions, profile: str | None, threads: int | None) -> Model:
    """A member that is named by a reference. Raises whatever `gnomon.load` raises."""
    member = entry if isinstance(entry, MemberOptions) else MemberOptions(model=str(entry))
    return load(
        member.model,
        profile=member.profile or profile,
        threads=threads,
        chat_template=_read_template(member.chat_template),
        max_sequences=1,
        ledger=False,
    )


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {path} cannot be read: {error}.", param="ensemble.members") from None


def policy_of(options: EnsembleOptions, names: Sequence[str], members: Sequence[MemberLike]) -> Policy:
    """The policy, with votes and primary that stand beside members. Raises UsageError for two primaries."""
    leaders = [place for place, m in enumerate(members) if isinstance(m, MemberOptions) and m.primary]
    if len(leaders) > 1 or (leaders and options.primary is not None):
        raise UsageError("The ensemble has two primaries.", hint="Mark one member.", param="ensemble.primary")
    if leaders:
        options = options.model_copy(update={"primary": leaders[0]})
    beside = None
    if any(isinstance(m, MemberOptions) and m.weight is not None for m in members):
        if options.weights is not None:
            raise UsageError(
                "Weights stand both in `weights` and beside members.", hint="Keep one.", param="ensemble.weights"
            )
        beside = [m.weight if isinstance(m, MemberOptions) and m.weight is not None else 1.0 for m in members]
    policy = Policy.of(options, names, beside)
    given = options.weights or beside
    if given and abs(sum(given) - 1) > 1e-9:
        log.info("Weights %s are normalised to %s.", given, [round(w, 4) for w in policy.weights])
    return policy


def names_of(members: Sequence[MemberLike], models: Sequence[Model]) -> list[str]:
    """Names that can be told apart: the second `a` is `a#2`."""
    found: list[str] = []
    for member, model in zip(members, models, strict=True):
        name = member.name if isinstance(member, MemberOptions) and member.name else model.name
        count = sum(other == name or other.startswith(f"{name}#") for other in found)
        found.append(name if not count else f"{name}#{count + 1}")
    return found


def reference_of(members: Sequence[MemberLike], options: EnsembleOptions) -> str:
    """A reference that opens this ensemble again: `ensemble:` and its options as JSON."""
    entries = [
        member.checkpoint.reference
        if isinstance(member, Model)
        else member.model_dump(exclude_defaults=True)
        if isinstance(member, MemberOptions)
        else str(member)
        for member in members
    ]
    said = options.model_dump(mode="json", exclude_defaults=True)
    return "ensemble:" + json.dumps({**said, "members": entries}, sort_keys=True)
