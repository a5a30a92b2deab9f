"""`gnomon learn grpo`: train a model by rewards, on the sampler's own arithmetic."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from gnomon.cli import common
from gnomon.errors import UsageError
from gnomon.learn.config import GRPOConfig


def _grpo(model: str | None, **values: Any) -> None:
    from pydantic import ValidationError

    from gnomon.learn.grpo import GRPOTrainer, Step, read_prompts
    from gnomon.learn.rewards import open_reward

    out, as_json = Path(values.pop("out")), values.pop("json")
    given = {name: values[name] for name in GRPOConfig.model_fields if values.get(name) not in (None, [])}
    try:
        config = GRPOConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{f'--{place}: ' if place else ''}{first['msg'].removeprefix('Value error, ')}.".replace("_", "-"),
            param=place,
        ) from None
    rewards = [open_reward(spec) for spec in values["reward"]]
    rows = read_prompts(Path(values["prompts"]))

    def show(step: Step) -> None:
        print(
            f"{step.step:5d}  reward {step.reward:8.4f}  loss {step.loss:9.5f}  tokens {step.completion_length:6.1f}  "
            f"KL to the sampler {step.kl_sampler_trainer:g}",
            file=sys.stderr,
        )

    with common.open_model(common.merged_settings(model, values)) as opened:
        result = GRPOTrainer(opened, rewards, rows, config).train(on_step=None if as_json else show)
    result.patch.save(out)
    if as_json:
        common.print_json(
            {
                "patch": str(out),
                "weights_digest": result.weights_digest,
                "fingerprint": result.fingerprint,
                "steps": [asdict(step) for step in result.steps],
            }
        )
        return
    print(f"wrote {out}\nweights {result.weights_digest[:16]}  fingerprint {result.fingerprint}")


def _flags() -> list[inspect.Parameter]:
    """One flag per option of GRPOConfig."""
    flags = []
    for name, info in GRPOConfig.model_fields.items():
        annotation: Any = info.annotation
        if isinstance(annotation, types.UnionType):
            annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
        if typing.get_origin(annotation) is typing.Literal:
            annotation, choices = str, ", ".join(typing.get_args(annotation))
        else:
            choices = ""
        many = typing.get_origin(annotation) is list
        default = "" if info.default in (None, False) else f" Default: {info.default}."
        text = f"{info.description}{f' One of {choices}.' if choices else ''}{default}"
        kind: Any = list[str] | None if many else annotation | None
        flags.append(common.option(name, kind, text))
    return flags


app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
grpo = common.command(
    _grpo,
    [
        common.argument("model", "Model reference or recipe; default: smollm2-135m-instruct."),
        common.option("prompts", str, "A .jsonl file of rows with a `prompt`, or a .txt file of lines.", default=...),
        common.option(
            "reward",
            list[str],
            "length:N, share:CHARACTERS, regex:PATTERN, json, or FILE.py:FUNCTION; several add up.",
            default=...,
        ),
        common.option("out", str, "Where the patch is written.", "--out", "-o", default="learned.safetensors"),
        *_flags(),
        *common.loading_options(),
        common.option("json", bool, "Everything, with every step, as JSON.", default=False),
    ],
    """Group-relative policy optimisation (GRPO), with the engine as its sampler.

    The trainer computes with the sampler's arithmetic: the KL between the two is logged at each step, and is 0. The
    same weights, prompts, rewards, options and threads end in the same weights, bit for bit. Names are those of trl.

    gnomon learn grpo --prompts prompts.txt --reward length:200 --max-steps 50 --learning-rate 1e-5
    """,
)
grpo.registered_commands[0].name = "grpo"
app.registered_commands += grpo.registered_commands


@app.callback()
def _group() -> None:
    """Train a model; the result is a patch."""
