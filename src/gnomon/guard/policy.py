"""The guard's policy: what `guard:` in a recipe, a request and a policy file may say. Parsed once.

Files, patterns and models may be named by the operator only. A request can add built-in checks; it can never remove
or soften one of the operator's. Knows nothing of how a policy is carried out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gnomon.capability import OPERATOR_ONLY
from gnomon.guard.views import VIEW_NAMES

Action = Literal["redact", "block", "replace", "flag", "vault"]


class Check(BaseModel):
    """One check: a pack of rules, a list of words, a pattern, or a scanner by name (`gnomon guard ls`)."""

    model_config = ConfigDict(extra="forbid")

    use: Annotated[str, Field(description="A rule pack (secrets, pii, ...), `words`, `regex`, `rules` or a scanner.")]
    action: Annotated[Action, Field(description="What happens to what is found.")] = "redact"
    name: Annotated[str | None, Field(description="The name findings bear; default: the rule's own.")] = None
    only: Annotated[list[str] | None, Field(description="Of a pack only these rules or entities.")] = None
    leave_out: Annotated[list[str], Field(description="Of a pack not these rules or entities.")] = []
    words: Annotated[list[str], Field(description="For `words`: what to look for.")] = []
    file: Annotated[str | None, OPERATOR_ONLY, Field(description="For `words`, `rules`: a file.")] = None
    regex: Annotated[str | None, OPERATOR_ONLY, Field(description="For `regex`: a pattern in RE2's syntax.")] = None
    match: Annotated[Literal["word", "str"], Field(description="Words: whole words, or anywhere.")] = "word"
    replacement: Annotated[str | None, Field(description="For `replace`; default: [REDACTED:rule].")] = None
    views: Annotated[list[str], Field(description=f"What to look at: {', '.join(VIEW_NAMES)}.")] = ["raw"]
    on_overflow: Annotated[
        Literal["redact_run", "block", "release"] | None,
        Field(description="When a match outgrows max_hold_chars: redact it as one, block, or let go and report."),
    ] = None
    threshold: Annotated[float | None, Field(ge=0, le=1, description="Scanners: from this score on it counts.")] = None
    mode: Annotated[Literal["gate", "async"], Field(description="Scanners: hold text, or report later.")] = "gate"
    stride: Annotated[int, Field(gt=0, description="Scanners: look again at least so many characters on.")] = 240
    context: Annotated[int, Field(gt=0, description="Scanners: characters they see.")] = 1000
    debounce: Annotated[int, Field(gt=0, description="Scanners: so many looks in a row must agree.")] = 1
    max_exposure_chars: Annotated[int, Field(ge=0, description="async: at most so many unchecked characters.")] = 480
    fail: Annotated[Literal["closed", "open"] | None, Field(description="When a scanner fails or is late.")] = None
    timeout_ms: Annotated[float | None, Field(gt=0, description="Scanners: how long one look may take.")] = None
    options: Annotated[dict[str, Any], OPERATOR_ONLY, Field(description="Scanners: their own settings.")] = {}

    @field_validator("views")
    @classmethod
    def _known_views(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in VIEW_NAMES:
                raise ValueError(f"no view `{name}`; known: {', '.join(VIEW_NAMES)}")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Check:
        if self.mode == "async" and self.action in ("redact", "replace", "vault"):
            raise ValueError(
                "an async check cannot redact: the text has left before it is judged; use `flag` or `gate`"
            )
        if self.replacement is not None and self.action not in ("replace", "redact"):
            raise ValueError(f"`replacement` means nothing with the action `{self.action}`")
        if self.use == "words" and not self.words and self.file is None:
            raise ValueError("`words` needs `words` or `file`")
        if self.use == "regex" and self.regex is None:
            raise ValueError("`regex` needs `regex`")
        return self


class Defaults(BaseModel):
    """What checks have that say nothing else."""

    model_config = ConfigDict(extra="forbid")

    fail: Annotated[Literal["closed", "open"], Field(description="When a scanner fails or is late.")] = "closed"
    max_hold_chars: Annotated[int, Field(ge=16, le=1 << 20, description="Most characters held for one match.")] = 4096
    max_added_ms: Annotated[float, Field(gt=0, description="How long one look of a scanner may take.")] = 1500
    on_overflow: Annotated[Literal["redact_run", "block", "release"], Field(description="See checks.")] = "redact_run"


class Rollback(BaseModel):
    """Taking back what was drawn, and going on differently."""

    model_config = ConfigDict(extra="forbid")

    tokens: Annotated[int, Field(gt=0, le=4096, description="Most tokens that are taken back at once.")] = 40
    retries: Annotated[int, Field(gt=0, le=100, description="Times an answer is taken back before it is blocked.")] = 5
    on: Annotated[
        list[Literal["block", "redact"]], Field(description="After which actions: block, redact or both.")
    ] = ["block"]


class OnBlock(BaseModel):
    """What happens when the text is blocked."""

    model_config = ConfigDict(extra="forbid")

    message: Annotated[str, Field(description="Said in place of the rest.")] = ""
    rollback: Annotated[
        Rollback | None, Field(description="Draw the blocked part again, otherwise, before giving up.")
    ] = None


class GuardOptions(BaseModel):
    """`guard:`. A string or list of check names is short for `output` with these checks."""

    model_config = ConfigDict(extra="forbid")

    default: Annotated[Defaults, OPERATOR_ONLY, Field(description="What checks have that say nothing else.")] = (
        Defaults()
    )
    input: Annotated[list[Check], Field(description="Checks of the prompt.")] = []
    output: Annotated[list[Check], Field(description="Checks of the answer.")] = []
    on_block: Annotated[OnBlock, OPERATOR_ONLY, Field(description="What is said when the answer is blocked.")] = (
        OnBlock()
    )
    shadow: Annotated[bool, OPERATOR_ONLY, Field(description="Only report: nothing is held, changed or blocked.")] = (
        False
    )

    show_held: Annotated[
        bool | None,
        Field(description="Tell how many characters are held now, of secrets too; false: not to requests either."),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if value is True or value == "default":
            value = DEFAULT
        if isinstance(value, str):
            value = [one.strip() for one in value.split(",")]
        if isinstance(value, list):
            value = {"output": value}
        if isinstance(value, dict):
            value = dict(value)
            for direction in ("input", "output"):
                if isinstance(value.get(direction), list):
                    value[direction] = [{"use": one} if isinstance(one, str) else one for one in value[direction]]
        return value

    @field_validator("output")
    @classmethod
    def _no_vault_outside(cls, value: list[Check]) -> list[Check]:
        if any(check.action == "vault" for check in value):
            raise ValueError("`vault` is for `input`: it is restored on the way out")
        return value


DEFAULT: dict[str, Any] = {"output": [{"use": "secrets"}, {"use": "pii"}]}
"""What `Guard(None)` does, in both directions."""


def merged(operator: GuardOptions, request: GuardOptions) -> GuardOptions:
    """The operator's policy with a request's checks added: both hold, the operator's settings stand."""
    return operator.model_copy(
        update={
            "input": [*operator.input, *request.input],
            "output": [*operator.output, *request.output],
            "show_held": request.show_held if operator.show_held is None else operator.show_held,
        }
    )


def parse_text(text: str) -> Any:
    """`--guard secrets,pii`, or the path of a policy file."""
    if text.endswith((".yaml", ".yml", ".json")):
        from gnomon.guard.guard import read_policy

        return read_policy(text).model_dump(exclude_unset=True, mode="json")
    return text
