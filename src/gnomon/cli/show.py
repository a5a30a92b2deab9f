"""`gnomon show`: what a model reference is."""

from __future__ import annotations

from typing import Any

import typer

from gnomon.cli.common import human_bytes, print_json, print_table

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def show(
    ref: str = typer.Argument(None, metavar="[REF]", help="Model reference; default: smollm2-135m-instruct."),
    tensors: bool = typer.Option(False, "--tensors", help="List every tensor."),
    template: bool = typer.Option(False, "--template", help="Print the chat template."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """What a model is: network, context, parameters, identity, path; nothing is loaded."""
    from gnomon.loading import open_reference
    from gnomon.models.checkpoint import Checkpoint
    from gnomon.models.zoo import DEFAULT_MODEL

    checkpoint: Checkpoint = open_reference(ref or DEFAULT_MODEL, fetch=False)
    if template:
        print(checkpoint.chat_template or "")
        return
    facts = _facts(checkpoint)
    listed = [checkpoint.info(name) for name in checkpoint] if tensors else []
    if json:
        infos = [{"name": info.name, "shape": list(info.shape), "dtype": info.dtype} for info in listed]
        print_json({**facts, **({"tensors": infos} if tensors else {})})
        return
    print_table(("", ""), [(key, value) for key, value in facts.items() if value is not None])
    if tensors:
        print_table(("TENSOR", "SHAPE", "DTYPE"), [(i.name, "x".join(map(str, i.shape)), i.dtype) for i in listed])


def _facts(checkpoint: Any) -> dict[str, Any]:
    from gnomon.models.zoo import zoo

    config = checkpoint.config
    path = checkpoint.path
    entry = zoo().get(checkpoint.name)
    size = path.stat().st_size if path is not None and path.is_file() else None
    types = sorted({checkpoint.info(name).dtype for name in checkpoint})
    return {
        "name": checkpoint.name,
        "reference": checkpoint.reference,
        "network": config.get("architectures", ["?"])[0],
        "parameters": checkpoint.parameters(),
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "context": config.get("max_position_embeddings"),
        "vocabulary": config.get("vocab_size"),
        "types": ", ".join(types),
        "chat_template": checkpoint.chat_template is not None,
        "licence": entry.licence if entry else None,
        "identity": checkpoint.identity,
        "path": str(path) if path is not None else None,
        "size": human_bytes(size) if size is not None else None,
    }
