"""Token limit: the prompt is too long. Options: limit; model (a reference whose tokenizer counts; default: words)."""

import re
from typing import Any

from gnomon.guard.scanning import Judgement, scanner

PIECE = re.compile(r"\w{1,4}|[^\w\s]")


def tokenizer(*, model: str = "", **others: Any) -> None:
    """The tokenizer that counts, if there is one."""
    if model:
        _count(model, "a")


@scanner(
    "token_limit",
    about="Too many tokens; options `limit`, `model`.",
    directions=("input",),
    state="exact",
    needs=tokenizer,
)
def token_limit(text: str, *, prompt: str = "", limit: int = 4096, model: str = "") -> Judgement:
    """Without a model, four letters or one sign count as a token."""
    count = _count(model, text) if model else len(PIECE.findall(text))
    return Judgement(float(count > limit), f"{count} tokens" if count > limit else "")


def _count(model: str, text: str) -> int:
    from gnomon.models.reference import open_checkpoint

    if model not in _tokenizers:
        _tokenizers[model] = open_checkpoint(model).tokenizer()
    return len(_tokenizers[model].encode(text))


_tokenizers: dict = {}  # type: ignore[type-arg]
