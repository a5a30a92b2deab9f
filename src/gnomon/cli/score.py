"""`gnomon score`: how likely a continuation is."""

from __future__ import annotations

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def score(
    prompt: str = typer.Argument(..., help="What comes before."),
    continuations: list[str] = typer.Argument(..., metavar="CONTINUATION...", help="What may follow."),
    model: str = typer.Option(None, "--model", "-m", help="Model reference; default: smollm2-135m-instruct."),
    json: bool = typer.Option(False, "--json", help="With every token's logprob."),
) -> None:
    """Log-probability and perplexity of continuations; the likeliest first.

    gnomon score "The capital of France is" " Paris" " London"
    """
    from gnomon.cli.common import merged_settings, open_model, print_json, print_table

    with open_model(merged_settings(model, {})) as opened:
        scored = [(text, opened.score(prompt, text)) for text in continuations]
    scored.sort(key=lambda pair: -pair[1].logprob)
    if json:
        print_json(
            [
                {
                    "continuation": text,
                    "logprob": s.logprob,
                    "perplexity": s.perplexity,
                    "tokens": [{"id": t.token_id, "text": t.text, "logprob": t.logprob} for t in s.tokens],
                }
                for text, s in scored
            ]
        )
        return
    rows = [(f"{s.logprob:.4f}", f"{s.perplexity:.2f}", len(s.tokens), repr(text)) for text, s in scored]
    print_table(("LOGPROB", "PERPLEXITY", "TOKENS", "CONTINUATION"), rows)
