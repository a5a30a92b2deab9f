"""`gnomon serve`: models behind an OpenAI-compatible API, with the studio page."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from gnomon.cli import common

KEYS = ("host", "port", "api_key", "admin_key", "served_name", "max_body_bytes", "max_prompt_tokens", "embeddings")


def _run(ref: str | None, **values: Any) -> None:
    started = time.monotonic()
    more: dict[str, Any] = {f"serve.{key}": values.get(key) for key in KEYS}
    more |= {f"engine.{key}": values.get(key) for key in common.ENGINE_KEYS}
    if values["no_auth"]:
        more["serve.auth"] = False
    for flag, key in (("allowed_host", "serve.allowed_hosts"), ("cors_origin", "serve.cors_origins")):
        more[key] = list(values[flag]) or None
    settings = common.merged_settings(ref, values, **more)
    options = settings.recipe.serve

    from gnomon.serve.run import address, bind, run

    listener = bind(options)  # before the model is loaded: a port in use is known at once
    model = common.open_model(settings)
    models = {options.served_name or model.name: model}
    if options.embeddings:
        embedder = common.open_model(settings, options.embeddings)
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


app = click.Command(
    "serve",
    callback=_run,
    help="""Serve REF (a model reference or a recipe; default: smollm2-135m-instruct).

    \b
    gnomon serve
    gnomon serve gemma-3-270m --port 9000 --embeddings minilm-l6-v2
    gnomon serve gnomon.yaml --api-key secret --host 0.0.0.0
    """,
    params=[
        click.Argument(["ref"], required=False),
        click.Option(["--host"], help="Address to bind to; default 127.0.0.1."),
        click.Option(["--port", "-p"], type=int, help="Port; default 8000, 0 takes a free one."),
        click.Option(["--api-key"], help="Clients must send it as a bearer token."),
        click.Option(["--admin-key"], help="For administrative routes; without one they are off."),
        click.Option(["--no-auth"], is_flag=True, help="Allow a public bind without a key."),
        click.Option(["--served-name"], help="The model's name in requests."),
        click.Option(["--embeddings"], help="Another model, for /v1/embeddings (e.g. minilm-l6-v2)."),
        click.Option(["--allowed-host"], multiple=True, help="A Host header to accept besides the bound address."),
        click.Option(["--cors-origin"], multiple=True, help="A web origin that may call from browsers."),
        click.Option(["--max-body-bytes"], type=int, help="Largest request body."),
        click.Option(["--max-prompt-tokens"], type=int, help="Largest prompt."),
        click.Option(["--kv-memory"], type=int, help="Bytes for keys and values."),
        click.Option(["--max-sequences"], type=int, help="Sequences decoded at once."),
        click.Option(["--token-budget"], type=int, help="Tokens computed in one step."),
        click.Option(["--max-context", "--max-model-len", "max_context"], type=int, help="Longest sequence."),
        *common.loading_options(),
    ],
)
