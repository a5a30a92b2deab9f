"""A tokenizer from GGUF metadata, built on the `tokenizers` library.

Two vocabularies: "gpt2" (byte-level BPE with listed merges) and "llama" (SentencePiece BPE with scores, from which
the merges follow). Honours add_bos_token, add_eos_token and add_space_prefix. Building from 262k scores takes seconds,
so the finished tokenizer is cached by the metadata's hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gnomon.errors import UnsupportedModel
from gnomon.models.cache import atomic_write, cache_dir
from gnomon.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

VERSION = 1
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
LISTED = "tokenizer.ggml."
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {
    "smollm": (GPT2_SPLIT, True),
    "gpt-2": (GPT2_SPLIT, False),
    "default": (GPT2_SPLIT, False),
    "llama-bpe": (LLAMA3_SPLIT, False),
    "llama3": (LLAMA3_SPLIT, False),
    "qwen2": (QWEN2_SPLIT, False),
}
"""pre-tokenizer name -> (pattern, whether every digit stands alone)"""
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")


def build(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises UnsupportedModel for a vocabulary or pre-tokenizer that is not known."""
    kind = metadata.get(LISTED + "model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(f"The GGUF tokenizer model `{kind}` is not supported.", hint="Supported: gpt2, llama.")
    tokens: Sequence[str] = metadata[LISTED + "tokens"]
    types = [int(t) for t in metadata.get(LISTED + "token_type", [NORMAL] * len(tokens))]
    space_prefix = bool(metadata.get(LISTED + "add_space_prefix", kind == "llama"))
    backend = _cached(
        metadata,
        lambda: (
            _byte_level(metadata, tokens, types) if kind == "gpt2" else _scored(metadata, tokens, types, space_prefix)
        ),
    )
    bos, eos = metadata.get(LISTED + "bos_token_id"), metadata.get(LISTED + "eos_token_id")
    ends = {int(metadata[LISTED + key]) for key in ("eos_token_id", "eot_token_id") if LISTED + key in metadata}
    if eos is not None and tokens[int(eos)] in TURN_ENDS:
        ends |= {i for i, t in enumerate(types) if t == CONTROL and tokens[i] in TURN_ENDS}
    return Tokenizer(
        backend,
        bos_token_id=int(bos) if bos is not None else None,
        eos_token_ids=frozenset(ends),
        special_ids=frozenset(i for i, t in enumerate(types) if t == CONTROL),
        add_bos=bool(metadata.get(LISTED + "add_bos_token", kind == "llama")),
        add_eos=bool(metadata.get(LISTED + "add_eos_token", False)),
        vocab_size=len(tokens),
        strip_first_space=kind == "llama" and space_prefix,
    )


def _cached(metadata: Mapping[str, Any], make: Any) -> Backend:
    """make(), remembered under the hash of everything it reads."""
    from tokenizers import Tokenizer as Backend

    path = cache_dir() / "tokenizers" / f"{_digest(metadata)}.json"
    if path.exists():
        return Backend.from_file(str(path))
    backend: Backend = make()
    try:
        with atomic_write(path) as out:
            out.write(backend.to_str().encode())
    except OSError:
        return backend  # a read-only cache costs a rebuild next time, nothing else
    return backend


def _digest(metadata: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(f"{VERSION}".encode())
    for key in ("model", "pre", "add_space_prefix", "tokens", "token_type", "scores", "merges"):
        value = metadata.get(LISTED + key)
        if isinstance(value, np.ndarray):
            digest.update(value.tobytes())
        elif isinstance(value, list):
            digest.update("\0".join(map(str, value)).encode())
        else:
            digest.update(json.dumps(value).encode())
    return digest.hexdigest()


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Backend:
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    name = metadata.get(LISTED + "pre", "default")
    if name not in SPLITS:
        raise UnsupportedModel(
            f"The GGUF pre-tokenizer `{name}` is not supported.", hint=f"Supported: {', '.join(SPLITS)}."
        )
    pattern, digits = SPLITS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata[LISTED + "merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, split, level])
    backend.decoder = decoders.ByteLevel()
    _add_specials(backend, tokens, types)
    return backend


def _scored(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], space_prefix: bool) -> Backend:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers

    unknown = metadata.get(LISTED + "unknown_token_id")
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_merges(tokens, types, metadata[LISTED + "scores"]),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=tokens[int(unknown)] if unknown is not None else None,
    )
    backend = Backend(bpe)
    prefix = [normalizers.Prepend("\u2581")] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    _add_specials(backend, tokens, types)
    return backend


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Any) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose result scores best: every split of a piece into two pieces is a merge.

    Ordered by the result's score, then its id, so that their rank is SentencePiece's own order.
    """
    pieces = {token: index for index, token in enumerate(tokens) if types[index] == NORMAL}
    found: list[tuple[float, int, int, str, str]] = []
    values = [float(score) for score in scores]
    for piece, index in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-values[index], index, cut, left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _add_specials(backend: Backend, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens are special; user-defined pieces (runs of spaces, tags) are matched whole before anything else."""
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken(tokens[i], normalized=False) for i, t in enumerate(types) if t == CONTROL])
    backend.add_tokens(
        [AddedToken(tokens[i], normalized=True, special=False) for i, t in enumerate(types) if t == USER_DEFINED]
    )
