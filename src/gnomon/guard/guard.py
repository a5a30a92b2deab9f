"""`Guard`: a policy compiled once; sessions, scans and tables from it. Thread-safe.

Policy in, sessions out. Knows nothing of engines, servers or commands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from gnomon.errors import ConfigError, UsageError
from gnomon.guard.automaton import Program, Source
from gnomon.guard.finding import Result
from gnomon.guard.lane import Lane, Plan
from gnomon.guard.lookout import Lookout
from gnomon.guard.policy import DEFAULT, Check, GuardOptions
from gnomon.guard.reports import Bound
from gnomon.guard.rules import KINDS, Rule, make_rule, pack, pack_names, read_rules, word_rule
from gnomon.guard.scanning import get, names
from gnomon.guard.session import Session
from gnomon.guard.step import verdict_of
from gnomon.guard.vault import Vault
from gnomon.guard.views import as_seen
from gnomon.guard.watching import Watch
from gnomon.registry import option_error

Direction = Literal["input", "output"]
VERSION = 2
RISK = {"block": 1.0, "redact": 1.0, "replace": 1.0, "vault": 1.0, "flag": 0.5}


@dataclass
class Compiled:
    """One direction of a policy: the rules in use, and what a session's lanes need."""

    bounds: list[Bound] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)


class Guard:
    """Checks by a policy: a mapping, GuardOptions, a YAML file, or None for secrets and personal data, redacted.

    `session()` guards a stream, `scan()` a whole text; both are the same code. Raises ConfigError, PatternError.
    """

    def __init__(self, policy: GuardOptions | Mapping[str, Any] | str | Path | None = None) -> None:
        self.options = read_policy(policy)
        folder = Path(policy).parent if isinstance(policy, Path) else Path()
        if policy is None:
            both = self.options.output
            self.options = self.options.model_copy(update={"input": both, "output": both})
        self._compiled = {
            direction: _compile(getattr(self.options, direction), self.options, folder)
            for direction in ("input", "output")
        }
        described = json.dumps(
            [VERSION, [[(r.id, r.pattern, str(r.check)) for r in one.rules] for one in self._compiled.values()]],
            sort_keys=True,
        )
        self.fingerprint = hashlib.sha256((described + self.options.model_dump_json()).encode()).hexdigest()[:16]

    @staticmethod
    @lru_cache(maxsize=64)
    def _of_json(text: str) -> Guard:
        return Guard(GuardOptions.model_validate_json(text))

    @classmethod
    def of(cls, options: GuardOptions) -> Guard:
        """The guard of parsed options; compiled once for equal options."""
        return cls._of_json(options.model_dump_json())

    def session(
        self,
        direction: Direction = "output",
        *,
        vault: Vault | None = None,
        prompt: str = "",
        waits: bool = True,
    ) -> Session:
        """A new stream. prompt: what it answers, for scanners that compare.

        waits: a push waits for the scanners that hold its text (each at most its time); without, what they clear leaves
        with a later push, only finish() waits, and the property `behind` says when to stop pushing for a while.
        """
        one, options = self._compiled[direction], self.options
        return Session(
            one.bounds,
            [Lane(plan) for plan in one.plans],
            Lookout(one.watches, prompt) if one.watches else None,
            f"{self.fingerprint}/{direction}",
            vault,
            options.shadow,
            options.on_block.message if direction == "output" else "",
            waits,
        )

    def scan(
        self, text: str | bytes, direction: Direction = "output", *, vault: Vault | None = None, prompt: str = ""
    ) -> Result:
        """A whole text: the same as pushing it in any pieces. A placeholder that it spells itself stays."""
        if vault is not None:
            vault.reserve(text if isinstance(text, str) else text.decode("utf-8", "replace"))
        session = self.session(direction, vault=vault, prompt=prompt)
        out = session.whole(text)
        findings = tuple(session.findings)
        risk = max([finding.score * RISK[finding.action] for finding in findings], default=0.0)
        verdict = verdict_of(findings)
        return Result(out, verdict in ("pass", "flag"), risk, findings, verdict)

    def resume(self, state: Mapping[str, Any]) -> Session:
        """Go on with a session saved by `session.state()`. Raises UsageError when the policy is another one."""
        direction = str(state.get("fingerprint", "")).rpartition("/")[2]
        if direction not in self._compiled:
            raise UsageError("This is no state of a guard session.")
        session = self.session(direction)  # type: ignore[arg-type]
        session.restore(state)
        return session

    @property
    def has_input(self) -> bool:
        return bool(self._compiled["input"].bounds)

    @property
    def has_output(self) -> bool:
        return bool(self._compiled["output"].bounds)

    def table(self) -> list[dict[str, Any]]:
        """Per rule in use: direction, name, action, views, longest match, what happens to endless ones."""
        rows = []
        for direction, one in self._compiled.items():
            for watch in one.watches:
                rows.append(
                    {
                        "direction": direction,
                        "rule": one.bounds[watch.number].name,
                        "action": watch.action,
                        "views": ["raw"],
                        "min_chars": 1,
                        "hold_chars": watch.stride * watch.debounce if watch.gate and watch.action != "flag" else 0,
                        "bounded": True,
                        "on_overflow": None,
                    }
                )
            for bound, rule, check in zip(one.bounds, one.rules, one.checks, strict=False):
                least, most = rule.width
                overflow = check.on_overflow or self.options.default.on_overflow
                rows.append(
                    {
                        "direction": direction,
                        "rule": bound.name,
                        "action": bound.action,
                        "views": check.views,
                        "min_chars": least,
                        "hold_chars": 0 if bound.action == "flag" else min(most or 10**9, self.max_hold),
                        "bounded": most is not None,
                        "on_overflow": None if most is not None and most <= self.max_hold else overflow,
                    }
                )
        return rows

    @property
    def max_hold(self) -> int:
        return self.options.default.max_hold_chars


def read_policy(policy: GuardOptions | Mapping[str, Any] | str | Path | None) -> GuardOptions:
    """A policy from wherever it comes. Raises ConfigError with file and key path."""
    if isinstance(policy, GuardOptions):
        return policy
    source = "guard"
    content: Any = DEFAULT if policy is None else policy
    if isinstance(policy, Path) or (isinstance(policy, str) and policy.endswith((".yaml", ".yml", ".json"))):
        source = str(policy)
        try:
            content = yaml.safe_load(Path(policy).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"The policy {policy} cannot be read: {error}.") from None
        if isinstance(content, dict) and "guard" in content and not {"input", "output"} & set(content):
            content = content["guard"]
    try:
        return GuardOptions.model_validate(content)
    except ValidationError as error:
        fault = option_error(error, () if source == "guard" else (source,))
        raise ConfigError(f"{source}: {fault.message}", hint=fault.hint, param=fault.param) from None


def _compile(checks: list[Check], options: GuardOptions, folder: Path) -> Compiled:
    one = Compiled()
    of_view: dict[str, list[int]] = {}
    for check in checks:
        _known_use(check.use)
    scanners = [check for check in checks if check.use not in KINDS and check.use not in pack_names()]
    for check in checks:
        for rule in [] if check in scanners else rules_of(check, folder):
            number = len(one.rules)
            name = check.name or rule.id
            replacement = check.replacement if check.replacement is not None else f"[REDACTED:{name}]"
            one.rules.append(rule)
            one.checks.append(check)
            one.bounds.append(Bound(name, check.action, replacement, rule.entity))
            for view in check.views:
                of_view.setdefault(view, []).append(number)
    for check in scanners:
        one.watches.append(_watch(check, options, one.bounds))
    for view, numbers in of_view.items():
        sources, overflow = [], {}
        for place, number in enumerate(numbers):
            rule, check = one.rules[number], one.checks[number]
            gate = check.action != "flag" and not options.shadow
            sources.append(
                Source(rule.before, rule.secret, gate, gate and check.action == "block", check.name or rule.id)
            )
            overflow[place] = check.on_overflow or options.default.on_overflow
        one.plans.append(
            Plan(
                view,
                tuple(one.rules[number] for number in numbers),
                tuple(numbers),
                _program(tuple(sources)),
                overflow,
                any(source.urgent for source in sources),
                options.default.max_hold_chars,
            )
        )
    return one


def _known_use(use: str) -> None:
    """Raises ConfigError naming what exists."""
    if use not in KINDS and use not in pack_names() and use not in names():
        kinds = [*KINDS, *pack_names(), *names()]
        raise ConfigError(f"No check `{use}`.", hint=f"There is: {', '.join(kinds)}.", param="use")


def _watch(check: Check, options: GuardOptions, bounds: list[Bound]) -> Watch:
    """A scanner's check; its rule and that of its failures are added to the bounds."""
    if check.action in ("redact", "replace", "vault") and "action" in check.model_fields_set:
        raise ConfigError(f"The scanner `{check.use}` judges whole passages: it can `block` or `flag`.", param="action")
    action = "flag" if check.action == "flag" or options.shadow else "block"
    scanner = get(check.use, threshold=check.threshold, **check.options)
    scanner.prepare()
    fail = check.fail or options.default.fail
    name = check.name or check.use
    bounds.append(Bound(name, action, ""))
    bounds.append(Bound("guard_error", "flag" if fail == "open" or action == "flag" else "block", ""))
    return Watch(
        scanner,
        len(bounds) - 2,
        len(bounds) - 1,
        action,
        scanner.threshold,
        gate=check.mode == "gate",
        stride=check.stride,
        context=check.context,
        debounce=check.debounce,
        max_exposure=check.max_exposure_chars,
        fail_open=fail == "open",
        seconds=(check.timeout_ms or options.default.max_added_ms) / 1000,
    )


@lru_cache(maxsize=64)
def _program(sources: tuple[Source, ...]) -> Program:
    return Program(sources)


def rules_of(check: Check, folder: Path = Path()) -> list[Rule]:
    """The rules that a check brings. Raises ConfigError naming what exists."""
    if check.use == "words":
        words = list(check.words)
        if check.file is not None:
            words += _lines(folder / check.file)
        words = as_seen(words, check.views)
        return [word_rule(check.name or "words", words, match=check.match, ignore_case=True)]
    if check.use == "regex":
        return [make_rule(check.name or "regex", check.regex or "")]
    if check.use == "rules":
        if check.file is None:
            raise ConfigError("`rules` needs `file`.", param="file")
        found = read_rules(folder / check.file)
    else:
        found = pack(check.use)
    named = {name for rule in found for name in (rule.id, rule.entity) if name}
    for name in [*(check.only or []), *check.leave_out]:
        if name not in named:
            raise ConfigError(
                f"`{check.use}` has no rule or entity `{name}`.", hint=f"It has: {', '.join(sorted(named))}."
            )
    return [
        rule
        for rule in found
        if (check.only is None or {rule.id, rule.entity} & set(check.only))
        and not {rule.id, rule.entity} & set(check.leave_out)
    ]


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The word list {path} cannot be read: {error}.", param="file") from None
