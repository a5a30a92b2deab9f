"""What `gnomon edit` tells of a patch or a memory: for people, and as values for `--json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gnomon.edit.memory import Memory


def about(patch: Any) -> dict[str, Any]:
    if isinstance(patch, Memory):
        return {"identity": patch.identity, "method": patch.method, "bytes": patch.bytes}
    return {
        "identity": patch.identity,
        "base": patch.base,
        "method": patch.metadata.get("method"),
        "bytes": patch.bytes,
        "tensors": sorted(patch.touches),
    }


def facts_line(patch: Any) -> str:
    facts = [fact.as_dict() for fact in patch.facts] if isinstance(patch, Memory) else patch.metadata.get("facts", [])
    first = f"{facts[0]['prompt']} -> {facts[0]['target']}" if facts else ""
    return first + (f" and {len(facts) - 1} more" if len(facts) > 1 else "")


def print_report(patch: Any, saved: Path | None) -> None:
    for told in patch.report.get("facts", ()):
        mark = {True: "holds", False: "DOES NOT HOLD"}.get(told.get("holds"), "")
        print(f"{told['prompt']} -> {told['target']}   {mark}")
        if "subject" in told:
            print(f"  subject  {told['subject']}")
        for key, label in (("before", "before"), ("after", "after")):
            if key in told:
                print(f"  {label:8} {_one_line(told[key])}")
            if f"chat_{key}" in told:
                print(f"  {'':8} in a chat: {_one_line(told[f'chat_{key}'])}")
    if isinstance(patch, Memory):
        print(f"method   {patch.method}; looked up by {patch.embedder}")
        print(f"memory   {patch.identity[:12]}, {patch.bytes / 1000:.1f} kB")
        if saved is not None:
            print(f"written  {saved}; use it with --remember @{saved}")
        return
    about = patch.metadata
    used = "; ".join(f"layer {k}: {v['corpus']}, {v['tokens']} tokens" for k, v in about.get("moments", {}).items())
    print(f"method   {about.get('method')}, {', '.join(sorted(patch.touches))}")
    if used:
        print(f"moments  {used}")
    seconds = patch.report.get("seconds")
    print(f"patch    {patch.identity[:12]}, {patch.bytes / 1000:.1f} kB" + (f", {seconds} s" if seconds else ""))
    if saved is not None:
        print(f"written  {saved}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
