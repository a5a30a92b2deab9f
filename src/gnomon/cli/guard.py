"""`gnomon guard`: scan texts, list rules and scanners, test and explain policies, train heads, guard another server."""

from __future__ import annotations

import csv
import json as json_module
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
import yaml

from gnomon.cli.common import print_json, print_table
from gnomon.errors import Blocked, ConfigError, GnomonError, UsageError
from gnomon.guard.guard import Guard, rules_of
from gnomon.guard.rules import pack, pack_names

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Check text: secrets, personal data, words, patterns. The same rules guard a stream (--guard, `guard:`).",
)
rules_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Rule files.")
app.add_typer(rules_app, name="rules")
POLICY = typer.Option("", "--policy", "-p", help="A policy file, or names: secrets,pii. Default: secrets and pii.")
DIRECTION = typer.Option("output", "--direction", help="Which checks of the policy: input or output.")
JSON = typer.Option(False, "--json", help="As JSON.")
FILE = typer.Argument("-", help="A file, or - for standard input.")


def _guard(policy: str) -> Guard:
    return Guard(Path(policy) if policy.endswith((".yaml", ".yml", ".json")) else policy or None)


def _read(file: str) -> bytes:
    return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()


def _direction(name: str) -> Any:
    if name not in ("input", "output"):
        raise UsageError(f"--direction is input or output, not `{name}`.", param="direction")
    return name


@app.command()
def ls(json: bool = JSON) -> None:
    """The rule packs with their rules, and the scanners; `unvalidated`: not `measured` on labelled data."""
    from gnomon.guard.scanning import get, names

    rows = [
        ("rule", f"{name}/{rule.id}", "exact", rule.help or rule.entity) for name in pack_names() for rule in pack(name)
    ]
    rows += [("scanner", name, get(name).state, get(name).about) for name in names()]
    if json:
        print_json([dict(zip(("kind", "name", "state", "about"), row, strict=True)) for row in rows])
        return
    print_table(("KIND", "NAME", "STATE", "ABOUT"), rows)


@app.command()
def scan(
    file: str = FILE,
    policy: str = POLICY,
    direction: str = DIRECTION,
    fail: bool = typer.Option(False, "--fail", help="Exit with 3 when anything but flags was found."),
    json: bool = JSON,
) -> None:
    """Print the text with what was found replaced; findings go to standard error."""
    result = _guard(policy).scan(_read(file), _direction(direction))
    if json:
        findings = [finding.as_dict() for finding in result.findings]
        print_json({"verdict": result.verdict, "risk": result.risk, "text": result.text, "findings": findings})
    else:
        sys.stdout.write(result.text)
        for finding in result.findings:
            print(finding, file=sys.stderr)
    if result.verdict in ("block", "guard_error") or (fail and not result.valid):
        raise Blocked(f"Verdict: {result.verdict}.")


@app.command()
def explain(file: str = FILE, policy: str = POLICY, direction: str = DIRECTION, json: bool = JSON) -> None:
    """Why each finding was made: its place as line and column, its rule's pattern and check. Never the text itself."""
    guard = _guard(policy)
    text = _read(file).decode("utf-8", "replace")
    rules: dict[str, Any] = {}
    for check in getattr(guard.options, _direction(direction)):
        try:
            rules |= {check.name or rule.id: rule for rule in rules_of(check)}
        except UsageError:
            continue  # a scanner: it has no pattern
    rows = []
    for finding in guard.scan(text, direction).findings:  # type: ignore[arg-type]
        before = text[: finding.start]
        rule = rules.get(finding.rule)
        rows.append(
            {
                **finding.as_dict(),
                "line": before.count("\n") + 1,
                "column": finding.start - (before.rfind("\n") + 1) + 1,
                "pattern": rule.pattern if rule else "",
                "check": str(rule.check) if rule and rule.check else "",
                "about": rule.help if rule else "",
            }
        )
    if json:
        print_json(rows)
        return
    shown = [
        (f"{r['line']}:{r['column']}", r["rule"], r["action"], r["score"], r.get("note") or r["pattern"][:70])
        for r in rows
    ]
    print_table(("PLACE", "RULE", "ACTION", "SCORE", "BECAUSE"), shown)


@app.command()
def check(
    policy: str = typer.Argument("", help="A policy file, or names: secrets,pii."),
    cases: str = typer.Option("", "--cases", help="A YAML list of {text, verdict, rules}: what the policy must say."),
    json: bool = JSON,
) -> None:
    """Compile a policy and show, per rule, what it does and how much text it may hold; or run its table of cases."""
    guard = _guard(policy)
    if cases:
        _run_cases(guard, Path(cases), json)
        return
    rows = guard.table()
    if json:
        print_json(rows)
        return
    shown = [
        (r["direction"], r["rule"], r["action"], ",".join(r["views"]), r["hold_chars"], r["on_overflow"] or "bounded")
        for r in rows
    ]
    print_table(("DIRECTION", "RULE", "ACTION", "VIEWS", "HOLDS", "ENDLESS"), shown)


def _run_cases(guard: Guard, path: Path, json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(yaml.safe_load(path.read_text(encoding="utf-8")) or []):
        result = guard.scan(case["text"], case.get("direction", "output"))
        rules = sorted({finding.rule for finding in result.findings})
        ok = result.verdict == case.get("verdict", result.verdict) and rules == sorted(case.get("rules", rules))
        rows.append({"case": number, "ok": ok, "verdict": result.verdict, "rules": rules})
    if json:
        print_json(rows)
    else:
        print_table(
            ("CASE", "", "VERDICT", "RULES"),
            [(r["case"], "ok" if r["ok"] else "WRONG", r["verdict"], ", ".join(r["rules"])) for r in rows],
        )
    if wrong := sum(not row["ok"] for row in rows):
        raise GnomonError(f"{wrong} of {len(rows)} cases are not as {path} says.")


def _texts(file: str) -> Iterator[str]:
    """The texts of JSON lines. Raises UsageError with the line that has none."""
    for number, line in enumerate(Path(file).read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json_module.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UsageError(f"{file}, line {number}: no JSON object with a `text`.")
        yield text


@app.command()
def replay(
    file: str = typer.Argument("", help="JSON lines with `text`; without it the texts of the ledger."),
    policy: str = POLICY,
    direction: str = DIRECTION,
    json: bool = JSON,
) -> None:
    """What a policy would have done with past texts: findings by rule, and per megabyte. Changes nothing."""
    guard, texts = _guard(policy), []
    if file:
        texts = list(_texts(file))
    else:
        from gnomon.ledger import Ledger

        texts = [run.text for run in Ledger().runs()]
    verdicts: Counter[str] = Counter()
    rules: Counter[tuple[str, str]] = Counter()
    for text in texts:
        result = guard.scan(text, _direction(direction))
        verdicts[result.verdict] += 1
        rules.update((finding.rule, finding.action) for finding in result.findings)
    megabytes = sum(map(len, texts)) / 1e6
    rows = [
        {"rule": rule, "action": action, "findings": count, "per_megabyte": round(count / max(megabytes, 1e-9), 1)}
        for (rule, action), count in rules.most_common()
    ]
    if json:
        print_json({"texts": len(texts), "characters": sum(map(len, texts)), "verdicts": dict(verdicts), "rules": rows})
        return
    print_table(("RULE", "ACTION", "FINDINGS", "PER MB"), [tuple(row.values()) for row in rows])
    print(
        f"{len(texts)} texts, {sum(map(len, texts))} characters: " + ", ".join(f"{n} {v}" for v, n in verdicts.items())
    )


@rules_app.command("import")
def import_rules(
    file: str = typer.Argument(..., help="A gitleaks.toml."),
    out: str = typer.Option("", "--out", "-o", help="Where to write the pack; default: standard output."),
) -> None:
    """Turn gitleaks' rules into a pack for `{use: rules, file: ...}`; remarks go to standard error."""
    from gnomon.guard.importing import gitleaks

    found = gitleaks(Path(file))
    text = yaml.safe_dump(found.pack, sort_keys=False, allow_unicode=True, width=10_000)
    if out:
        part = Path(out + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(out)
    else:
        sys.stdout.write(text)
    for rule, remark in found.remarks:
        print(f"{rule}: {remark}", file=sys.stderr)
    print(f"{len(found.pack['rules'])} rules taken, {len(found.remarks)} remarks", file=sys.stderr)


@app.command("train-head")
def train_head(
    data: str = typer.Argument(..., help="CSV or JSON lines with a text and a label."),
    out: str = typer.Option(..., "--out", "-o", help="The head to write (safetensors)."),
    test: str = typer.Option("", "--test", help="Labelled text to measure on; default: every tenth text of DATA."),
    text: str = typer.Option("text", "--text", help="Name of the text's column."),
    label: str = typer.Option("label", "--label", help="Name of the label's column."),
    model: str = typer.Option("minilm-l6-v2", "--model", "-m", help="The encoder."),
    adversarial: int = typer.Option(0, "--adversarial", min=0, help="Rounds of disguised texts (experimental)."),
    positive: str = typer.Option("1", "--positive", help="With --adversarial: the label that is disguised to slip by."),
    json: bool = JSON,
) -> None:
    """Train a classifier head on sentence vectors, and say honestly how it does on text it has not seen."""
    from gnomon.guard.adversary import harden
    from gnomon.guard.head import report, train
    from gnomon.guard.scanners.embedding import vectors
    from gnomon.progress import progress

    rows = _labelled(Path(data), text, label)
    held_out = _labelled(Path(test), text, label) if test else rows[::10]
    rows = rows if test else [row for place, row in enumerate(rows) if place % 10]

    def embedded(some: list[tuple[str, str]]) -> Any:
        import numpy as np

        parts = []
        with progress("embedding", len(some)) as bar:
            for at in range(0, len(some), 32):
                parts.append(vectors([one for one, _ in some[at : at + 32]], model))
                bar.advance(len(parts[-1]))
        return np.concatenate(parts)

    history: list[Any] = []
    if adversarial:
        if positive not in {kind for _, kind in rows}:
            raise UsageError(f"No text has the label `{positive}`.", hint="Name the bad label: --positive LABEL.")

        def by_text(texts: list[str]) -> Any:
            return embedded([(one, "") for one in texts])

        head, history = harden(rows, held_out, by_text, model=model, positive=positive, rounds=adversarial)
    else:
        head = train(embedded(rows), [kind for _, kind in rows], model=model)
    measured = report(head, embedded(held_out), [kind for _, kind in held_out]).as_dict()
    record = {"trained_on": Path(data).name, "texts": len(rows), "measured_on": Path(test or data).name, **measured}
    if history:
        record["adversarial"] = [one.as_dict() for one in history]
    type(head)(head.weight_CK, head.bias_K, head.labels, head.model, record).write(Path(out))
    if json:
        print_json(record)
        return
    print_table(("", ""), [(key, value) for key, value in record.items() if key not in ("roc", "adversarial")])
    _print_roc(record)
    if history:
        print_table(tuple(record["adversarial"][0]), [tuple(one.values()) for one in record["adversarial"]])


@app.command("train-coprocessor")
def train_coprocessor(
    data: str = typer.Argument(..., help="JSON lines: text, risk (safe|controversial|unsafe), category, boundary."),
    out: str = typer.Option(..., "--out", "-o", help="The heads to write (safetensors)."),
    model: str = typer.Option("smollm2-135m-instruct", "--model", "-m", help="The model that reads along."),
    json: bool = JSON,
) -> None:
    """Train the two heads of the co-processor on labelled texts; every fifth is kept to measure on. Experimental."""
    import numpy as np

    from gnomon.guard.coprocessor import Example, Reading, train
    from gnomon.guard.head import measured
    from gnomon.loading import load

    examples = []
    for number, line in enumerate(Path(data).read_text("utf-8").splitlines()):
        try:
            row = json_module.loads(line)
            kind = str(row.get("category", ""))
            examples.append(Example(str(row["text"]), str(row["risk"]), kind, int(row.get("boundary", 0))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{data}, line {number + 1}: {type(error).__name__}: {error}.") from None
    with load(model) as loaded:
        heads = train([one for place, one in enumerate(examples) if place % 5], loaded)
        held = examples[::5]
        scores = np.array([Reading(heads, loaded)(one.text).score for one in held])
    risky = np.array([one.risk != "safe" for one in held])
    how = measured(scores, risky, float(((scores >= 0.5) == risky).mean())).as_dict()
    record = {"trained_on": Path(data).name, "texts": len(examples) - len(held), "measured_on": Path(data).name, **how}
    replace(heads, record=record).write(Path(out))
    if json:
        print_json(record)
        return
    print_table(("", ""), [(key, value) for key, value in record.items() if key != "roc"])
    _print_roc(record)


def _print_roc(record: dict[str, Any]) -> None:
    """Of a detector: at which threshold how much is found for how many false alarms."""
    if record["roc"]:
        rows = [tuple(f"{value:.3f}" for value in point) for point in record["roc"]]
        print_table(("THRESHOLD", "FALSE ALARMS", "FOUND"), rows)


def _labelled(path: Path, text: str, label: str) -> list[tuple[str, str]]:
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                rows: list[Any] = list(csv.DictReader(file))
        else:
            rows = [json_module.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return [(str(row[text]), str(row[label])) for row in rows if str(row[text]).strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from None
    except KeyError as error:
        raise UsageError(f"{path} has no column {error}.", hint="Name it with --text or --label.") from None


@app.command()
def proxy(
    upstream: str = typer.Option(..., "--upstream", help="The OpenAI-compatible server to guard."),
    policy: str = POLICY,
    host: str = typer.Option("127.0.0.1", "--host", help="Address to bind to."),
    port: int = typer.Option(8001, "--port", help="Port to bind to."),
) -> None:
    """Guard any OpenAI-compatible server: point clients here instead of there."""
    import uvicorn

    from gnomon.serve.guard_proxy import create_proxy

    application = create_proxy(upstream, _guard(policy))
    print(f"guarding {upstream} at http://{host}:{port}/v1", file=sys.stderr)
    uvicorn.run(application, host=host, port=port, log_level="warning", access_log=False)
