"""`gnomon serve`: models behind an OpenAI-compatible API, with the studio page."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gnomon.cli import common
from gnomon.errors import UsageError

if TYPE_CHECKING:
    from gnomon.model import Model

KEYS = (
    "host",
    "port",
    "api_key",
    "admin_key",
    "served_name",
    "max_body_bytes",
    "max_prompt_tokens",
    "max_waiting",
    "replicas",
    "ray_address",
    "embeddings",
)


def _run(ref: str | None, **values: Any) -> None:
    started = time.monotonic()
    more: dict[str, Any] = {f"serve.{key}": values.get(key) for key in KEYS}
    more |= {f"engine.{key}": values.get(key) for key in common.ENGINE_KEYS}
    if values["no_auth"]:
        more["serve.auth"] = False
    repeated = {"allowed_host": "allowed_hosts", "cors_origin": "cors_origins", "patch": "patches"}
    for flag, key in ((flag, f"serve.{key}") for flag, key in repeated.items()):
        more[key] = values[flag] or None
    settings = common.merged_settings(ref, values, **more, **common.option_keys(common.given_options(values)))
    options = settings.recipe.serve

    from gnomon.serve.run import address, bind, run

    if options.replicas > 1:
        from gnomon.cli.replicas import run_replicas

        run_replicas(settings, started)
        return

    listener = bind(options)  # before the model is loaded: a port in use is known at once
    model = common.open_model(settings)
    load_patches(model, options.patches)
    models = {options.served_name or model.name: model}
    if options.embeddings:
        from gnomon.loading import load

        embedder = load(options.embeddings, threads=settings.recipe.threads)
        models[embedder.name] = embedder

    from gnomon.serve.app import create_app

    app = create_app(models, options)
    where = address(listener)

    def ready() -> None:
        for name, opened in models.items():
            print(f"  {name}  {opened.fingerprint}", file=sys.stderr)
        print(f"  studio  {where}/\n  API     {where}/v1\n  docs    {where}/docs", file=sys.stderr)
        print(f"Ready in {time.monotonic() - started:.1f} s. Ctrl-C stops.", file=sys.stderr)

    run(app, listener, options, ready)


def load_patches(model: Model, entries: Sequence[str]) -> None:
    """Load every NAME=FILE. Raises UsageError for another form, and what a patch that does not fit raises."""
    for entry in entries:
        name, given, file = entry.partition("=")
        if not given or not file:
            raise UsageError(f"`{entry}` is not NAME=FILE.", param="serve.patches")
        model.patches.add(name, file)


app = common.command(
    _run,
    [
        common.argument("ref", "Model reference or recipe."),
        common.option("host", str | None, "Address to bind to; default 127.0.0.1."),
        common.option("port", int | None, "Port; default 8000, 0 takes a free one.", "--port", "-p"),
        common.option("api_key", str | None, "Clients must send it as a bearer token."),
        common.option("admin_key", str | None, "For administrative routes; without one they are off."),
        common.option("no_auth", bool, "Allow a public bind without a key.", default=False),
        common.option("served_name", str | None, "The model's name in requests."),
        common.option("embeddings", str | None, "Another model, for /v1/embeddings (e.g. minilm-l6-v2)."),
        common.option("patch", list[str] | None, "NAME=FILE: a patch that requests may name (docs/patch.md)."),
        common.option("allowed_host", list[str] | None, "A Host header to accept besides the bound address."),
        common.option("cors_origin", list[str] | None, "A web origin that may call from browsers."),
        common.option("max_body_bytes", int | None, "Largest request body."),
        common.option("max_prompt_tokens", int | None, "Largest prompt."),
        common.option("max_waiting", int | None, "Requests that may wait before 429 is answered."),
        common.option("replicas", int | None, "Processes that serve, behind one router (needs the extra `cluster`)."),
        common.option("ray_address", str | None, "A running Ray cluster for the replicas; default: this machine."),
        common.option("kv_memory", int | None, "Bytes for keys and values."),
        common.option("max_sequences", int | None, "Sequences decoded at once."),
        common.option("token_budget", int | None, "Tokens computed in one step."),
        common.option("max_context", int | None, "Longest sequence.", "--max-context", "--max-model-len"),
        *common.loading_options(),
        *common.capability_flags(leave_out=("n", "echo", "logprobs", "patches")),
    ],
    """Serve REF (a model reference or a recipe; default: smollm2-135m-instruct).

    Options of a generation (--temperature, --guard, ...) hold for requests that say nothing else; a request may add to
    a guard, and never take it away.

    \b
    gnomon serve
    gnomon serve gemma-3-270m --port 9000 --embeddings minilm-l6-v2
    gnomon serve --guard '{"output": ["secrets", "pii"]}' --temperature 0.7
    gnomon serve gnomon.yaml --api-key secret --host 0.0.0.0
    """,
)
