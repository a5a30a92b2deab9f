"""`gnomon ps`: ask a running server what it serves."""

from __future__ import annotations

import httpx
import typer

from gnomon.cli.common import print_json, print_table
from gnomon.errors import NotReady

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def ps(
    url: str = typer.Option("http://127.0.0.1:8000", "--url", envvar="GNOMON_URL", help="The server's address."),
    api_key: str = typer.Option(None, "--api-key", envvar="GNOMON_API_KEY", help="The server's key."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """The models of a running server, and what they are doing."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=5) as http:
            reply = http.get("/v1/models")
            metrics = http.get("/metrics")
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise NotReady(f"No server answers at {url}: {error}.", hint="Start one: gnomon serve") from None
    if reply.is_error:
        raise NotReady(f"{url} answered {reply.status_code}: {reply.json().get('error', {}).get('message', '')}")
    rows = []
    for entry in reply.json()["data"]:
        running, waiting = (
            _metric(metrics.text, f"gnomon:num_requests_{kind}", entry["id"]) for kind in ("running", "waiting")
        )
        rows.append({**entry, "running": running, "waiting": waiting})
    if json:
        print_json(rows)
        return
    columns = ("MODEL", "PROFILE", "CONTEXT", "FINGERPRINT", "RUNNING", "WAITING")
    print_table(
        columns,
        [
            (
                r["id"],
                r.get("profile") or r.get("kind"),
                r.get("max_model_len"),
                r.get("fingerprint"),
                r["running"],
                r["waiting"],
            )
            for r in rows
        ],
    )


def _metric(text: str, name: str, model: str) -> int | None:
    for line in text.splitlines():
        if line.startswith(f'{name}{{model="{model}"}}'):
            return int(float(line.rsplit(" ", 1)[1]))
    return None
