"""Merging bare tensor files (.safetensors, .bin, .pt): no config, no tokenizer, no layers to slice.

The file is mergekit-pytorch's: `models: [{model: a.safetensors, parameters}]`, `base_model`, `parameters`, `dtype`.
Pickles are read by torch's weights-only load: one that asks for anything but tensors is refused.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from gnomon.errors import CheckpointError, MergeError
from gnomon.merge.build import MergeRun, Source, parse_source
from gnomon.merge.merged import MergedCheckpoint
from gnomon.merge.plan import Planner
from gnomon.merge.shards import Shard, lay_out
from gnomon.merge.writer import write_tensors
from gnomon.models.bin_checkpoint import BinCheckpoint, load_tensors
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.safetensors_checkpoint import DirectoryCheckpoint, read_header

PICKLES = (".bin", ".pt", ".pth")


class TensorFile(DirectoryCheckpoint):
    """One safetensors file as a checkpoint without a config."""

    def __init__(self, path: Path) -> None:
        self._open_bare(path)
        self.files = [path]
        self._stored = read_header(path)
        self._maps = {}
        self._handles = {}

    def _open_bare(self, path: Path) -> None:
        self.path = self.folder = path
        self.reference = self.name = str(path)
        self.config = {}
        self.generation_config = {}
        self.chat_template = None


class PickleFile(BinCheckpoint):
    """One .bin or .pt file as a checkpoint without a config."""

    def __init__(self, path: Path) -> None:
        self.path = self.folder = path
        self.reference = self.name = str(path)
        self.config = {}
        self.generation_config = {}
        self.chat_template = None
        self.files = [path]
        self._tensors = load_tensors(path)


def open_tensors(path: Path) -> Checkpoint:
    """Raises CheckpointError for a file that is missing or of another kind."""
    if not path.is_file():
        raise CheckpointError(f"There is no tensor file {path}.")
    if path.suffix == ".safetensors":
        return TensorFile(path)
    if path.suffix in PICKLES:
        return PickleFile(path)
    raise CheckpointError(f"{path} is no tensor file.", hint=f"Known: .safetensors, {', '.join(PICKLES)}.")


def merge_raw(config: Source, run: MergeRun | None = None) -> MergedCheckpoint:
    """Plan a merge of tensor files. Raises MergeError for slices, modules or tokenizers."""
    run = run or MergeRun()
    options, source, folder = parse_source(config)
    if options.slices or options.modules or options.tokenizer or options.tokenizer_source or options.chat_template:
        raise MergeError(f"{source}: tensor files merge by `models` alone: no slices, modules or tokenizer.")
    paths = {ref: folder / ref if (folder / ref).exists() else Path(ref) for ref in options.references()}
    models = {reference: open_tensors(path) for reference, path in paths.items()}
    plan = Planner(options, models, source).plan(seed=run.seed, compat=run.compat)
    return MergedCheckpoint(
        plan, models, reference=source, threads=run.threads or 1, allow_nonfinite=run.allow_nonfinite
    )


def write_raw(merged: MergedCheckpoint, out: Path, *, overwrite: bool = False) -> Path:
    """One safetensors file, whole or not at all. Raises MergeError where something else stands."""
    shards, slots = lay_out(merged, 1 << 62, merged.identity)
    if out.exists() and not overwrite and not _is(out, shards[0]):
        raise MergeError(f"{out} already exists and is not this merge.", hint="Choose another path, or --overwrite.")
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        write_tensors(merged, partial, shards, slots, threads=merged.threads)
        (partial / shards[0].file).replace(out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise MergeError(f"The disk of {out.parent.resolve()} is full; {out} was not made.") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _is(file: Path, shard: Shard) -> bool:
    """Whether a file begins as this merge's does: its header holds the identity."""
    if not file.is_file():
        return False
    with file.open("rb") as handle:
        return handle.read(len(shard.header)) == shard.header
