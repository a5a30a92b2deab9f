"""Tokenizer with a byte view: text to token ids, and every token's exact bytes.

Stands on the `tokenizers` library for encoding; decoding goes through the byte view, so that streamed and whole
decoding agree on every id list, broken UTF-8 included. Knows nothing of models or chats.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnomon.errors import CheckpointError, PromptError
from gnomon.models.detokenizer import IncrementalDetokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class Tokenizer:
    """One model's vocabulary and rules.

    eos_token_ids: every token that ends a turn. special_ids: control tokens, which text shown to people leaves out.
    strip_first_space: SentencePiece's dummy prefix, which decoding takes away again.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token_id: int | None,
        eos_token_ids: frozenset[int],
        special_ids: frozenset[int],
        add_bos: bool,
        add_eos: bool = False,
        vocab_size: int | None = None,
        strip_first_space: bool = False,
    ) -> None:
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.special_ids = special_ids
        self.add_bos = add_bos and bos_token_id is not None
        self.add_eos = add_eos
        self.vocab_size = vocab_size if vocab_size is not None else backend.get_vocab_size(with_added_tokens=True)
        self.strip_first_space = strip_first_space
        self._kind = _kind(backend)
        self._added = {index: token.content for index, token in backend.get_added_tokens_decoder().items()}
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """tokenizer.json, tokenizer_config.json and generation_config.json of a Hugging Face model directory."""
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the Rust library raises plain Exception
            raise CheckpointError(f"{path / 'tokenizer.json'} cannot be read: {error}.") from None
        backend.no_truncation()
        backend.no_padding()
        config = _read_optional(path / "tokenizer_config.json")
        network = _read_optional(path / "config.json")
        ends = _read_optional(path / "generation_config.json").get("eos_token_id")
        if ends is None:
            ends = network.get("eos_token_id")
        eos = {ends} if isinstance(ends, int) else set(ends or ())
        eos |= {i for i in [_token_id(backend, config.get("eos_token"))] if i is not None}
        bos = _token_id(backend, config.get("bos_token"))
        post = json.loads(backend.to_str()).get("post_processor")
        adds_bos = bos is not None and bos in backend.encode("", add_special_tokens=True).ids
        return cls(
            backend,
            bos_token_id=bos,
            eos_token_ids=frozenset(eos),
            special_ids=frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special),
            add_bos=bool(config.get("add_bos_token", adds_bos)) or (adds_bos and post is not None),
            # A network's table may have more rows than the tokenizer has names.
            vocab_size=max(backend.get_vocab_size(with_added_tokens=True), network.get("vocab_size") or 0),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From the `tokenizer.ggml.*` metadata of a GGUF file."""
        from gnomon.models.gguf_tokenizer import build

        return build(metadata)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Text as token ids. add_special_tokens: with the model's BOS (and EOS, where it adds one).

        parse_special=False reads the text of a control token ("<|im_end|>") as plain text: use it for what a user
        wrote, so that nobody can end a turn by typing. Raises PromptError for text that is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"The text is not valid Unicode at character {error.start}.") from None
        if self._kind == "wordpiece":
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        ids: list[int] = []
        if text:
            self.backend.encode_special_tokens = not parse_special
            ids = list(self.backend.encode(text, add_special_tokens=False).ids)
        if add_special_tokens:
            if self.add_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
                ids.insert(0, self.bos_token_id)
            if self.add_eos and self.eos_token_ids:
                ids.append(min(self.eos_token_ids))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Token ids as text: their joined bytes as UTF-8, U+FFFD for what is broken."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join(map(detokenizer.push, ids)) + detokenizer.finish()

    def detokenizer(self, *, skip_special_tokens: bool = True, shown: Collection[int] = ()) -> IncrementalDetokenizer:
        """A fresh incremental decoder. shown: control tokens whose text is not skipped."""
        return IncrementalDetokenizer(
            self.token_bytes,
            self.special_ids.difference(shown) if skip_special_tokens else frozenset(),
            strip_first_space=self.strip_first_space,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """A token's exact bytes. Raises PromptError for an id outside the vocabulary."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._compute_bytes(token_id)
        return self._bytes[token_id]

    def _compute_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode("utf-8")
        piece = self.backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if piece is None:
            if 0 <= token_id < self.vocab_size:
                return b""  # a row of the embedding that the vocabulary does not name
            raise PromptError(f"Token id {token_id} is outside the vocabulary 0..{self.vocab_size - 1}.")
        if self._kind == "byte_level":
            table = _byte_of_character()
            return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode("utf-8")
        if self._kind == "wordpiece":
            return piece[2:].encode("utf-8") if piece.startswith("##") else (" " + piece).encode("utf-8")
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("\u2581", " ").encode("utf-8")

    def token_text(self, token_id: int) -> str:
        """A token for display."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def ids_of_controls(self, texts: Sequence[str]) -> dict[str, int]:
        """Those of these texts that are control tokens, with their ids."""
        found = {text: self.backend.token_to_id(text) for text in texts}
        return {text: token for text, token in found.items() if token is not None and token in self.special_ids}

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids

    @cached_property
    def sha256(self) -> str:
        """Names the vocabulary and all rules: part of cache keys."""
        rules = [self.add_bos, self.add_eos, self.bos_token_id, sorted(self.eos_token_ids)]
        return hashlib.sha256((self.backend.to_str() + json.dumps(rules)).encode()).hexdigest()


def _kind(backend: Backend) -> str:
    """How a token's text stands for bytes: "byte_level" (GPT-2's table), "wordpiece", or "sentencepiece"."""
    model = type(backend.model).__name__
    if model == "WordPiece":
        return "wordpiece"
    parts = repr(backend.pre_tokenizer) + repr(backend.decoder)
    return "byte_level" if "ByteLevel" in parts else "sentencepiece"


_TABLE: dict[str, int] = {}


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted: printable bytes stand for themselves, others from U+0100."""
    if not _TABLE:
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        _TABLE.update({chr(byte): byte for byte in printable})
        _TABLE.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return _TABLE


def _token_id(backend: Backend, entry: Any) -> int | None:
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return backend.token_to_id(text) if isinstance(text, str) else None


def _read_optional(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    from gnomon.models.safetensors_checkpoint import read_json

    return read_json(path)
