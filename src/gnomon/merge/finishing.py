"""The end of a run: index, config, tokenizer and record beside the weights, all synced, then the final name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gnomon.errors import CheckpointError
from gnomon.merge.journal import JOURNAL, Done
from gnomon.merge.merged import MergedCheckpoint
from gnomon.merge.shards import Shard, Slot
from gnomon.models import identity
from gnomon.models.safetensors_checkpoint import read_chat_template

RECORD = "gnomon_merge.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip
JOINED_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Those of them that stay true when the vocabulary grows."""


def finish(
    merged: MergedCheckpoint,
    partial: Path,
    shards: Iterable[Shard],
    slots: Sequence[Slot],
    done: Done,
    name: str,
    copy_tokenizer: bool,
    around: str,
) -> dict[str, str]:
    """Index, config, tokenizer and the record; everything synced. Returns the sha256 of every file."""
    files = [shard.file for shard in shards]
    if len(files) > 1:
        table = {slot.name: slot.file for slot in slots}
        index = {"metadata": {"total_size": sum(slot.size for slot in slots)}, "weight_map": table}
        _put_json(partial / "model.safetensors.index.json", index)
    _put_json(partial / "config.json", merged.config)
    if merged.generation_config:
        _put_json(partial / "generation_config.json", merged.generation_config)
    if copy_tokenizer:
        _put_tokenizer(merged, partial)
    (partial / JOURNAL).unlink()
    with ThreadPoolExecutor(1) as beside:  # to the disk while their sums are taken
        synced = beside.submit(_sync_all, [partial / file for file in files])
        sums = {file.name: _file_digest(file) for file in sorted(partial.iterdir()) if file.name != RECORD}
        synced.result()
    infos = [merged.info(slot.name) for slot in slots]
    weights = identity.of_tensors((info.name, info.dtype, info.shape, done.digests[info.name]) for info in infos)
    record = {
        "identity": name,
        "around": around,
        "weights_identity": weights,
        "inputs": {reference: model.identity for reference, model in merged.models.items()},
        "seed": merged.plan.seed,
        "compat": merged.plan.compat,
        "warnings": list(merged.plan.warnings),
        "tensors": len(slots),
        "bytes": sum(slot.size for slot in slots),
        "files": sums,
    }
    _put_json(partial / RECORD, record)
    _sync_all(partial.iterdir())
    _sync(partial)
    return sums


def _put_tokenizer(merged: MergedCheckpoint, folder: Path) -> None:
    """The donor's tokenizer files as they are, or the joined tokenizer; then the chat template."""
    joined = merged.vocabulary is not None and merged.vocabulary.changed
    donor = merged.vocabulary.source if merged.vocabulary is not None else merged.donor
    home = donor.path
    if home is not None and home.is_dir():
        for file in TOKENIZER_FILES:
            if (home / file).exists() and not (joined and file not in JOINED_FILES):
                shutil.copyfile(home / file, folder / file)
    elif merged.vocabulary is None:
        try:
            backend = merged.donor.tokenizer().backend
        except CheckpointError:
            return  # a model directory without a tokenizer merges too
        (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
        _put_json(folder / "tokenizer_config.json", _special_tokens(merged))
    if merged.vocabulary is not None:
        merged.vocabulary.write(folder)
    if merged.chat_template is not None and merged.chat_template != read_chat_template(folder):
        (folder / "chat_template.jinja").write_text(merged.chat_template, encoding="utf-8")


def _special_tokens(merged: MergedCheckpoint) -> dict[str, Any]:
    tokenizer = merged.donor.tokenizer()
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if tokenizer.bos_token_id is not None:
        config["bos_token"] = tokenizer.backend.id_to_token(tokenizer.bos_token_id)
        config["add_bos_token"] = tokenizer.add_bos
    if tokenizer.eos_token_ids:
        config["eos_token"] = tokenizer.backend.id_to_token(min(tokenizer.eos_token_ids))
    return config


def _put_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _file_digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync_all(paths: Iterable[Path]) -> None:
    for path in paths:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(partial: Path, out: Path) -> None:
    """The finished directory under its final name; what stood there goes only after that."""
    if not out.exists():
        partial.rename(out)
        return
    old = out.parent / f"{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    partial.rename(out)
    shutil.rmtree(old)
