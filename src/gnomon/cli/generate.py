"""`gnomon generate`: continue a prompt. Clean text on standard output, everything else on standard error."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from gnomon.cli import common


def _run(prompt: str | None, **values: Any) -> None:
    text = common.read_prompt(prompt)
    settings = common.merged_settings(values["model"], values)
    options = common.given_options(values)
    with common.open_model(settings) as model:
        given = [{"role": "user", "content": text}] if values["chat"] else text
        if values["json"]:
            result = model.chat(given, **options) if values["chat"] else model.generate(text, **options)
            many = result if isinstance(result, list) else [result]
            common.print_json([_plain(generation) for generation in many] if len(many) > 1 else _plain(many[0]))
            return
        several = int(options.get("n") or model.defaults.get("n") or 1) > 1
        stream = values["stream"] if values["stream"] is not None else sys.stdout.isatty()
        if several or not stream:
            result = model.chat(given, **options) if values["chat"] else model.generate(text, **options)
            texts = [generation.text for generation in (result if isinstance(result, list) else [result])]
            print("\n---\n".join(texts))
            return
        for chunk in model.stream(given, **options):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
        print()


def _plain(value: Any) -> dict[str, Any]:
    """A Generation as JSON values; a token's bytes as a list of numbers."""

    def plain(item: Any) -> Any:
        if isinstance(item, bytes):
            return list(item)
        if isinstance(item, dict):
            return {key: plain(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [plain(inner) for inner in item]
        return item

    result: dict[str, Any] = plain(dataclasses.asdict(value))
    return result


app = common.command(
    _run,
    [
        common.argument("prompt", "The prompt; - or nothing reads standard input."),
        common.option("model", str | None, "Model reference or recipe; default: the zoo's smallest.", "--model", "-m"),
        common.option(
            "chat", bool, "PROMPT is one user message, through the chat template.", "--chat", "-c", default=False
        ),
        common.option("stream", bool | None, "Print as it comes; default: on a terminal.", "--stream/--no-stream"),
        common.option("json", bool, "The whole Generation: ids, logprobs, seed, fingerprint, usage.", default=False),
        *common.loading_options(),
        *common.capability_flags(),
    ],
    """Continue PROMPT (or standard input, for -).

    \b
    gnomon generate "The capital of France is" --max-tokens 8
    gnomon generate --chat "Name three colours" -t 0.7 --seed 1
    git diff | gnomon generate - -m gemma-3-270m
    """,
)
