"""A true union of byte-pair vocabularies: the other tokenizers' tokens AND merges, not tokens that match before merges.

The donor's merges keep their order and come first, so what they cut stays cut as before, until a further merge joins
pieces. For tokenizers of one family: same normaliser, same pre-tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gnomon.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


def joined(donor: Backend, others: Mapping[str, Backend], where: str) -> tuple[Backend, int]:
    """(the donor's tokenizer with all tokens and merges, how many tokens are new). Raises ConfigError."""
    from tokenizers import Tokenizer

    content = json.loads(donor.to_str())
    model = content["model"]
    for reference, other in others.items():
        theirs = json.loads(other.to_str())
        _check(content, theirs, reference, where)
        control = {token["content"] for token in theirs["added_tokens"]}
        known = {*model["vocab"], *(token["content"] for token in content["added_tokens"])}
        ids = [*model["vocab"].values(), *(token["id"] for token in content["added_tokens"])]
        fresh = sorted(theirs["model"]["vocab"].items(), key=lambda pair: pair[1])
        names = [token for token, _ in fresh if token not in known and token not in control]
        model["vocab"] |= {token: place for place, token in enumerate(names, max(ids) + 1)}
        merges = _pairs(model["merges"])
        present = set(merges)
        further = [pair for pair in _pairs(theirs["model"]["merges"]) if pair not in present]
        possible = [pair for pair in further if all(part in model["vocab"] for part in (*pair, "".join(pair)))]
        model["merges"] = [list(pair) for pair in (*merges, *possible)]
    before = donor.get_vocab_size(with_added_tokens=True)
    backend = Tokenizer.from_str(json.dumps(content))
    return backend, backend.get_vocab_size(with_added_tokens=True) - before


def _check(content: Mapping[str, Any], theirs: Mapping[str, Any], reference: str, where: str) -> None:
    for side in (content, theirs):
        if side["model"].get("type") != "BPE":
            raise ConfigError(f"{where}: `merges: true` joins BPE tokenizers only.", param="tokenizer.merges")
    for part in ("normalizer", "pre_tokenizer"):
        if content.get(part) != theirs.get(part):
            raise ConfigError(
                f"{where}: {reference} has another {part.replace('_', '-')} than the base: their merges do not join.",
                hint="Leave `merges` out: tokens are then added whole.",
                param="tokenizer.merges",
            )


def _pairs(merges: Sequence[Any]) -> list[tuple[str, str]]:
    """Both spellings of a merge in tokenizer.json."""
    return [(m[0], m[1]) if isinstance(m, list) else (m.split(" ", 1)[0], m.split(" ", 1)[1]) for m in merges]
