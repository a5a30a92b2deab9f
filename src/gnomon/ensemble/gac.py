"""GaC's YAML (arXiv 2406.12585), read unmodified, as ensemble options.

`weight` is a model's path, `score` its vote under NORM_TYPE "score", `priority: primary` makes it lead with
THRESHOLD as the gate. GPU placement (`max_memory`, `num_gpus`) means nothing on this engine and is said to be ignored;
`quantization` chooses a profile (8bit: int8; 4bit has no like here and is refused).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from gnomon.errors import ConfigError

log = logging.getLogger("gnomon.ensemble")
MODELS, NORM, THRESHOLD = "CONFIG_API_SERVER", "NORM_TYPE_API_SERVER", "THRESHOLD_API_SERVER"
KNOWN = {"weight", "name", "max_memory", "num_gpus", "score", "priority", "quantization"}
PROFILES = {"none": None, "8bit": "int8"}


def is_gac(content: Mapping[str, Any]) -> bool:
    return MODELS in content


def from_gac(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """EnsembleOptions as a mapping. Raises ConfigError naming file and key."""
    if unknown := sorted(set(content) - {MODELS, NORM, THRESHOLD}):
        raise ConfigError(f"{source}: unknown key `{unknown[0]}`.", hint=f"Known: {MODELS}, {NORM}, {THRESHOLD}.")
    norm = content.get(NORM, "average")
    if norm not in ("average", "score"):
        raise ConfigError(f"{source}: `{NORM}` is {norm!r}; it is 'average' or 'score'.", param=NORM)
    entries = content[MODELS]
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{source}: `{MODELS}` lists no models.", param=MODELS)
    members = [
        _member(entry, f"{MODELS}.{place}", source, by_score=norm == "score") for place, entry in enumerate(entries)
    ]
    options: dict[str, Any] = {"core": "union", "renormalize": False, "members": members}
    if any(member.get("primary") for member in members):
        if THRESHOLD not in content:
            raise ConfigError(f"{source}: a primary model needs `{THRESHOLD}`.", param=THRESHOLD)
        options |= {"when": "gate", "threshold": content[THRESHOLD]}
    return options


def _member(entry: Any, where: str, source: str, *, by_score: bool) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("weight"), str):
        raise ConfigError(f"{source}: `{where}.weight` names no model.", param=f"{where}.weight")
    if unknown := sorted(set(entry) - KNOWN):
        raise ConfigError(f"{source}: unknown key `{where}.{unknown[0]}`.", hint=f"Known: {', '.join(sorted(KNOWN))}.")
    if ignored := sorted({"max_memory", "num_gpus"} & set(entry)):
        log.warning("%s: `%s` of %s places models on GPUs; it is ignored here.", source, "`, `".join(ignored), where)
    quantization, priority = entry.get("quantization", "none"), entry.get("priority", "supportive")
    if quantization not in PROFILES:
        raise ConfigError(
            f"{source}: `{where}.quantization: {quantization}` is not available.",
            hint="none, 8bit (int8), or a .gguf file with the gguf profile.",
            param=f"{where}.quantization",
        )
    if priority not in ("primary", "supportive"):
        raise ConfigError(f"{source}: `{where}.priority` is {priority!r}; it is 'primary' or 'supportive'.")
    member: dict[str, Any] = {"model": entry["weight"], "primary": priority == "primary"}
    member |= {"name": entry["name"]} if entry.get("name") else {}
    member |= {"profile": PROFILES[quantization]} if PROFILES[quantization] else {}
    if by_score:
        score = entry.get("score")
        if not isinstance(score, int | float):
            raise ConfigError(f"{source}: `{where}.score` is needed under '{NORM}: score'.", param=f"{where}.score")
        member["weight"] = float(score)
    return member
