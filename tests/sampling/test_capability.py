"""The registry: one declaration gives the keyword, the recipe key, the request field and the flag."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict

from gnomon.capability import OPERATOR_ONLY, Capability, Origin
from gnomon.errors import ConfigError, Conflict, NotAllowedInRequest, UnknownOption, UsageError
from gnomon.registry import Registry
from gnomon.stages import Released


class ShoutOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    mark: str = "!"
    words: Annotated[Path | None, OPERATOR_ONLY] = None


class ShoutStage:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def push(self, text: str) -> Released:
        return Released(text.upper())

    def finish(self) -> Released:
        return Released(self.mark, settled=0)


def build_shout(options: ShoutOptions, context: Any) -> ShoutStage:
    return ShoutStage(options.mark)


SHOUT = Capability(name="shout", help="Louder.", options=ShoutOptions, stream_stage=f"{__name__}:build_shout")
QUIET = Capability(name="quiet", help="Softer.", options=ShoutOptions, conflicts=(("shout", "one cannot do both."),))


def test_options_are_validated_once_wherever_they_come_from() -> None:
    registry = Registry([SHOUT])
    for origin in Origin:
        parsed = registry.parse({"shout": {"mark": "?"}}, origin)
        assert parsed["shout"] == ShoutOptions(mark="?")


def test_a_request_may_not_name_files() -> None:
    registry = Registry([SHOUT])
    given = {"shout": {"words": "/etc/passwd"}}
    assert registry.parse(given, Origin.RECIPE)["shout"].words == Path("/etc/passwd")  # type: ignore[attr-defined]
    with pytest.raises(NotAllowedInRequest, match=r"shout\.words"):
        registry.parse(given, Origin.REQUEST)


def test_conflicts_are_refused_with_their_reason() -> None:
    with pytest.raises(Conflict, match="one cannot do both"):
        Registry([SHOUT, QUIET]).parse({"shout": {}, "quiet": {}}, Origin.PYTHON)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperatur": 1}, "Did you mean `temperature`"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens 5"),
        ({"logit_bias": {"3": 200}}, "outside -100..100"),
    ],
)
def test_wrong_options_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Registry.installed().parse(given, Origin.REQUEST)


def test_two_capabilities_cannot_claim_one_name() -> None:
    with pytest.raises(ConfigError, match="shout"):
        Registry([SHOUT, SHOUT])


def test_an_unknown_key_lists_the_near_one() -> None:
    with pytest.raises(UnknownOption, match="shout"):
        Registry([SHOUT]).parse({"shoud": {}}, Origin.RECIPE)


THIRD_PARTY = """
from pydantic import BaseModel
from gnomon.capability import Capability
from gnomon.stages import Released

class Options(BaseModel):
    suffix: str = "?"

class Stage:
    def __init__(self, suffix): self.suffix = suffix
    def push(self, text): return Released(text.upper())
    def finish(self): return Released(self.suffix, settled=0)

def build(options, context): return Stage(options.suffix)

UPPER = Capability(name="upper", help="Upper case.", options=Options, stream_stage="third_party:build")
"""


def test_a_third_party_package_joins_by_entry_point_only(tmp_path: Path, tiny_dir: Path) -> None:
    (tmp_path / "third_party.py").write_text(THIRD_PARTY)
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gnomon.capabilities]\nupper = third_party:UPPER\n")
    script = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import gnomon
model = gnomon.load({str(tiny_dir)!r}, threads=1)
plain = model.generate("abc", max_tokens=20).text
print(model.generate("abc", max_tokens=20, upper={{"suffix": "!?"}}).text == plain.upper() + "!?")
from gnomon.recipe import json_schema
print("upper" in json_schema()["properties"])
from gnomon.cli.common import capability_flags
print(any(flag.name == "upper" for flag in capability_flags()))
model.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["True", "True", "True"], done.stderr
