"""Joining vocabularies: one tokenizer for the output, and every model's token tables laid out in its order.

A row that a model lacks comes from where `tokens:` says, else from the base, else from its one owner, else it is the
mean over its owners (mergekit's rules). Rows are gathered in runs, block by block; no table is held whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gnomon.errors import ConfigError
from gnomon.merge.blocks import Reader
from gnomon.merge.byte_pairs import joined
from gnomon.merge.config import MergeOptions, TokenizerOptions, TokenRule, TokenSource
from gnomon.merge.layout import HEADS
from gnomon.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from gnomon.models.tokenizer import Tokenizer

Rows = tuple[tuple[str, int], ...]
"""Rows of models whose mean fills a row; none of them: zeros."""
MEAN_OF_ALL: Rows = (("*", -1),)


@dataclass(frozen=True)
class Vocabulary:
    """The output's vocabulary. donor: whose tokenizer it grew from. size: rows of the tables.

    old_ids: per model, new row -> its own row or -1. fill: per model, what stands in the rows that it lacks.
    """

    donor: str
    size: int
    backend: Backend
    old_ids: Mapping[str, Tensor]
    fill: Mapping[str, Mapping[int, Rows]]
    source: Checkpoint
    warnings: tuple[str, ...] = ()
    changed: bool = True
    """Whether the tokenizer differs from the donor's own."""

    @property
    def digest(self) -> str:
        parts = [self.backend.to_str(), str(self.size)]
        parts += [json.dumps(sorted((row, rows) for row, rows in fill.items())) for fill in self.fill.values()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def reader(self, model: str, tensor: str, models: Mapping[str, Checkpoint]) -> Reader:
        """A model's table in the output's order."""
        checkpoint = models[model]
        columns = checkpoint.info(tensor).shape[1] if len(checkpoint.info(tensor).shape) > 1 else 1
        own = checkpoint.reader(tensor)
        old_ids, fill = self.old_ids[model], self.fill[model]
        owners: dict[str, Reader] = {}

        def row_of(owner: str, row: int) -> Tensor:
            if owner not in owners:
                owners[owner] = models[owner].reader(_name_in(models[owner], tensor))
            return owners[owner](row * columns, (row + 1) * columns)

        def filled(rows: Rows, like: Tensor) -> Tensor:
            if rows == MEAN_OF_ALL:
                return _mean_row(own, int(old_ids.max()) + 1, columns).to(like.dtype)
            if not rows:
                return torch.zeros(columns, dtype=like.dtype)
            if len(rows) == 1:
                return row_of(*rows[0]).to(like.dtype)
            return torch.stack([row_of(*row).float() for row in rows]).mean(0).to(like.dtype)

        def read(start: int, stop: int) -> Tensor:
            first, last = start // columns, stop // columns
            ids = old_ids[first:last]
            out_RC = own(0, columns).new_zeros(last - first, columns)
            for begin, end in _runs(ids):
                low = int(ids[begin])
                out_RC[begin:end] = own(low * columns, (low + end - begin) * columns).reshape(-1, columns)
            for row in (ids < 0).nonzero().reshape(-1).tolist():
                out_RC[row] = filled(fill[first + row], out_RC)
            return out_RC.reshape(-1)

        return read

    def tokenizer(self) -> Tokenizer:
        """The joined tokenizer with the donor's rules."""
        from gnomon.models.tokenizer import Tokenizer

        own = self.source.tokenizer()
        return Tokenizer(
            self.backend,
            bos_token_id=own.bos_token_id,
            eos_token_ids=own.eos_token_ids,
            special_ids=frozenset(i for i, t in self.backend.get_added_tokens_decoder().items() if t.special),
            add_bos=own.add_bos,
            add_eos=own.add_eos,
            vocab_size=self.size,
            strip_first_space=own.strip_first_space,
        )

    def write(self, folder: Path) -> None:
        """tokenizer.json, in place of the copied one."""
        if self.changed:
            (folder / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")


@dataclass
class _Joining:
    """Works out one document's vocabulary."""

    options: TokenizerOptions
    models: Mapping[str, Checkpoint]
    base: str | None
    donor: str
    where: str
    warnings: list[str] = field(default_factory=list)

    def run(self) -> Vocabulary:
        tables = {reference: _table(checkpoint) for reference, checkpoint in self.models.items()}
        backend = self.models[self.donor].tokenizer().backend
        before = backend.get_vocab_size(with_added_tokens=True)
        if self.options.merges:
            backend = self._join_merges(backend)
        if self.options.source == "union":
            self._extend(backend, tables)
        ids = dict(backend.get_vocab(with_added_tokens=True))
        self._add_named_tokens(backend, ids)
        # a padded table keeps its size: what runs the model may count on it
        padded = int(self.models[self.donor].config.get("vocab_size") or 0)
        size = max(padded, max(ids.values()) + 1)
        if (multiple := self.options.pad_to_multiple_of) is not None:
            size = -(-size // multiple) * multiple
        old_ids = {reference: self._old_ids(reference, table, ids, size) for reference, table in tables.items()}
        fill = self._fill(tables, ids, old_ids)
        changed = backend.get_vocab_size(with_added_tokens=True) != before
        source = self.models[self.donor]
        return Vocabulary(self.donor, size, backend, old_ids, fill, source, tuple(self.warnings), changed)

    def _join_merges(self, backend: Backend) -> Backend:
        if self.options.source != "union":
            raise ConfigError(f"{self.where}: tokenizer.merges needs `source: union`.", param="tokenizer.merges")
        others = {r: self.models[r].tokenizer().backend for r in self.models if r != self.donor}
        backend, count = joined(backend, others, self.where)
        self.warnings.append(f"{count} tokens join with their merges; text is cut as the base cuts it, then further.")
        return backend

    def _extend(self, backend: Backend, tables: Mapping[str, Mapping[str, int]]) -> None:
        """Append what the donor lacks: plain tokens of the others in their order, then their control tokens."""
        from tokenizers import AddedToken

        known = set(backend.get_vocab(with_added_tokens=True))
        others = [reference for reference in tables if reference != self.donor]
        added = {r: self.models[r].tokenizer().backend.get_added_tokens_decoder() for r in others}
        named = {token.content for tokens in added.values() for token in tokens.values()}
        for reference in others:
            fresh = [t for t, _ in sorted(tables[reference].items(), key=lambda pair: pair[1])]
            fresh = [token for token in fresh if token not in known and token not in named]
            backend.add_tokens([AddedToken(token, normalized=False) for token in fresh])
            known.update(fresh)
            if fresh:
                self.warnings.append(
                    f"{len(fresh)} tokens of {reference} become added tokens: they match before the merges, so that "
                    "plain text may be cut differently than by any of the models."
                )
        for reference in others:
            for token in added[reference].values():
                if token.content not in known and token.content in tables[reference]:
                    backend.add_tokens([token]) if not token.special else backend.add_special_tokens([token])
                    known.add(token.content)

    def _add_named_tokens(self, backend: Backend, ids: dict[str, int]) -> None:
        from tokenizers import AddedToken

        for token in self.options.tokens:
            if token not in ids:
                backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
                ids[token] = backend.get_vocab(with_added_tokens=True)[token]

    def _old_ids(self, reference: str, table: Mapping[str, int], ids: Mapping[str, int], size: int) -> Tensor:
        """New row -> the model's own row, -1 where it has none."""
        old = torch.full((size,), -1, dtype=torch.int64)
        for token, new in ids.items():
            old[new] = table.get(token, -1)
        if reference == self.donor:
            rows = int(self.models[reference].config.get("vocab_size") or 0)
            unnamed = torch.ones(rows, dtype=torch.bool)
            unnamed[[new for new in ids.values() if new < rows]] = False
            old[:rows][unnamed] = torch.arange(rows)[unnamed]  # the donor's padding rows stay as they are
        return old

    def _fill(
        self,
        tables: Mapping[str, Mapping[str, int]],
        ids: Mapping[str, int],
        old_ids: Mapping[str, Tensor],
    ) -> dict[str, dict[int, Rows]]:
        names = {new: token for token, new in ids.items()}
        fill: dict[str, dict[int, Rows]] = {reference: {} for reference in tables}
        missing = torch.stack(list(old_ids.values())).amin(0) < 0
        forced = [ids[token] for token, rule in self.options.tokens.items() if rule.force]
        for new in sorted({*missing.nonzero().reshape(-1).tolist(), *forced}):
            token = names.get(new)
            rule = self.options.tokens.get(token) if token is not None else None
            lacking = [r for r in tables if int(old_ids[r][new]) < 0 or (rule is not None and rule.force)]
            if not lacking:
                continue
            rows = self._rows_of(token, rule, tables, old_ids, new)
            for reference in lacking:
                fill[reference][new] = rows
                old_ids[reference][new] = -1
        return fill

    def _rows_of(
        self,
        token: str | None,
        rule: TokenRule | None,
        tables: Mapping[str, Mapping[str, int]],
        old_ids: Mapping[str, Tensor],
        new: int,
    ) -> Rows:
        """Where a row that somebody lacks comes from."""
        if rule is not None:
            return self._ruled(str(token), rule, tables)
        if token is None:
            donor_row = int(old_ids[self.donor][new])
            return ((self.donor, donor_row),) if donor_row >= 0 else MEAN_OF_ALL
        owners = [(reference, table[token]) for reference, table in tables.items() if token in table]
        if self.base is not None and token in tables.get(self.base, {}):
            return ((self.base, tables[self.base][token]),)
        if not owners:
            self.warnings.append(f"No model has an embedding for `{token}`: its row is zero.")
        return tuple(owners)

    def _ruled(self, token: str, rule: TokenRule, tables: Mapping[str, Mapping[str, int]]) -> Rows:
        path = f"tokenizer.tokens.{token}"
        source = rule.source
        if isinstance(source, str):
            model, wanted = source, token
            row: int | None = None
        elif source.kind == "zero":
            return ()
        else:
            model, wanted, row = self._model_token(source, path)
        if row is None:
            row = tables[model].get(wanted)
        if row is None:
            raise ConfigError(f"{self.where}: {model} has no token `{wanted}` (in {path}).", param=path)
        return ((model, row),)

    def _model_token(self, source: TokenSource, path: str) -> tuple[str, str, int | None]:
        if source.model is None or (source.token is None) == (source.token_id is None):
            raise ConfigError(
                f"{self.where}: {path}.source needs a model and either token or token_id.", param=f"{path}.source"
            )
        rows = int(self.models[source.model].config.get("vocab_size") or 0)
        if source.token_id is not None and not 0 <= source.token_id < rows:
            raise ConfigError(
                f"{self.where}: {source.model} has {rows} tokens, no token_id {source.token_id} (in {path}).",
                param=path,
            )
        return source.model, source.token or "", source.token_id


def join_vocabularies(options: MergeOptions, models: Mapping[str, Checkpoint], where: str) -> Vocabulary | None:
    """The vocabulary of a document with `tokenizer_source` or `tokenizer`; None without."""
    if options.tokenizer_source is None and options.tokenizer is None:
        return None
    wanted = options.tokenizer or TokenizerOptions(source=options.tokenizer_source or "union")
    first = options.base_model or next(iter(models))
    donor = first if wanted.source in ("union", "base") else wanted.source
    return _Joining(wanted, models, options.base_model, donor, where).run()


def _table(checkpoint: Checkpoint) -> dict[str, int]:
    """token -> row, of the tokens that have a row."""
    rows = checkpoint.config.get("vocab_size")
    vocabulary = checkpoint.tokenizer().backend.get_vocab(with_added_tokens=True)
    return {token: i for token, i in vocabulary.items() if rows is None or i < rows}


def _name_in(checkpoint: Checkpoint, tensor: str) -> str:
    return tensor if tensor in checkpoint else HEADS.get(tensor, tensor)


def _mean_row(own: Reader, rows: int, columns: int) -> Tensor:
    """The mean over a table's rows, a thousand at a time."""
    total = torch.zeros(columns, dtype=torch.float64)
    for first in range(0, rows, 1024):
        part = own(first * columns, min(rows, first + 1024) * columns)
        total += part.reshape(-1, columns).sum(0, dtype=torch.float64)
    return total / max(1, rows)


def _runs(ids: Tensor) -> Sequence[tuple[int, int]]:
    """[begin, end) of stretches of rows that lie one after another in the file."""
    if len(ids) == 0:
        return []
    breaks = ((ids[1:] != ids[:-1] + 1) | (ids[1:] < 0)).nonzero().reshape(-1) + 1
    edges = [0, *breaks.tolist(), len(ids)]
    return [(a, b) for a, b in pairwise(edges) if int(ids[a]) >= 0]
