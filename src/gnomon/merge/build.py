"""`gnomon.merge.merge`: from a merge file (or its content) to a MergedCheckpoint, written when `out` is given.

Opens the models that the file names, joins vocabularies and configs, resolves files of several documents.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnomon.errors import ConfigError, MergeError
from gnomon.kernels import available_threads
from gnomon.merge.config import MergeOptions, is_merge_file, parse_config, read_documents
from gnomon.merge.data import Data, Texts
from gnomon.merge.merged import MergedCheckpoint
from gnomon.merge.plan import Planner
from gnomon.merge.templates import chat_template
from gnomon.merge.vocabulary import Vocabulary, join_vocabularies
from gnomon.models.checkpoint import Checkpoint

SUFFIXES = (".yaml", ".yml")
Source = str | Path | Mapping[str, Any] | MergeOptions
_opening = threading.local()


@dataclass(frozen=True)
class MergeRun:
    """How to run it, beside what the file says. seed: of DARE's and DELLA's draws. threads: 0 for all CPUs."""

    seed: int = 0
    compat: bool = False
    threads: int = 0
    truncate_embeddings: bool = False
    allow_nonfinite: bool = False
    bare: bool = False
    """Take a directory without weights for what its config says: enough to plan."""


def merge(
    config: Source,
    *,
    out: str | Path | None = None,
    max_memory: int | str | None = None,
    models: Mapping[str, Checkpoint] | None = None,
    seed: int = 0,
    compat: bool = False,
    threads: int = 0,
    truncate_embeddings: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> Checkpoint:
    """Merge models as a merge file says; without `out` nothing is written: tensors are computed when asked for.

    config: a path, a mapping, or parsed options. models: open checkpoints by the names that the file uses.
    max_memory: bytes or "2GB", planned before and kept. compat: replay torch's generator and dtypes as mergekit does.
    Raises ConfigError, MergeError, UsageError, CheckpointError.
    """
    run = MergeRun(seed, compat, threads, truncate_embeddings, allow_nonfinite)
    merged = open_merge(config, run, models)
    if out is None:
        return merged
    from gnomon.merge.writer import write
    from gnomon.models.reference import open_path

    write(merged, Path(out), max_memory=max_memory, overwrite=overwrite)
    return open_path(Path(out))


def open_merge(
    config: Source,
    run: MergeRun | None = None,
    models: Mapping[str, Checkpoint] | None = None,
    folder: Path | None = None,
) -> MergedCheckpoint:
    """A merge file as a checkpoint. Of several documents the unnamed (or last) one is the result.

    folder: where the relative paths of a mapping start; a file's start where it lies.
    """
    run = run or MergeRun()
    if isinstance(config, str | Path):
        path = Path(config)
        with _not_twice(path):
            return _documents(read_documents(path), str(path), path.parent, run, dict(models or {}))
    content = config if isinstance(config, MergeOptions) else dict(config)
    return _one(parse_config(content), "merge", folder or Path(), run, dict(models or {}))


def open_models(config: Source, run: MergeRun | None = None) -> tuple[MergeOptions, dict[str, Checkpoint]]:
    """The document of a merge file that is its result, and the models that it names, other documents included."""
    known: dict[str, Checkpoint] = {}
    if not isinstance(config, str | Path):
        options, source, folder = parse_source(config)
    else:
        source, folder = str(config), Path(config).parent
        *named, options = documents_in_order(Path(config))
        for document in named:
            known[str(document.name)] = open_document(document, Path(config), run or MergeRun(), known)
    return options, {
        ref: known[ref] if ref in known else open_model(ref, folder, source) for ref in options.references()
    }


def parse_source(config: Source) -> tuple[MergeOptions, str, Path]:
    """(parsed options, what to call the file in messages, where its relative paths start), of one document."""
    source, folder, content = "merge", Path(), config
    if isinstance(config, str | Path):
        source, folder = str(config), Path(config).parent
        documents = read_documents(Path(config))
        if len(documents) != 1:
            raise ConfigError(f"{source} has {len(documents)} documents; this command takes a file of one.")
        content = documents[0]
    return parse_config(content, source), source, folder


def _documents(
    documents: Sequence[Any], source: str, folder: Path, run: MergeRun, known: dict[str, Checkpoint]
) -> MergedCheckpoint:
    *named, final = _ordered(documents, source)
    for options in named:
        known[str(options.name)] = _one(options, f"{source} ({options.name})", folder, run, known)
    return _one(final, source, folder, run, known)


def documents_in_order(file: Path) -> list[MergeOptions]:
    """A file's documents so that each stands after those it refers to; the result comes last."""
    return _ordered(read_documents(file), str(file))


def open_document(
    options: MergeOptions, file: Path, run: MergeRun, known: Mapping[str, Checkpoint]
) -> MergedCheckpoint:
    """One document of a file. known: the others that it names."""
    return _one(options, str(file), file.parent, run, known)


def _ordered(documents: Sequence[Any], source: str) -> list[MergeOptions]:
    """Raises ConfigError where names are missing or doubled, or documents refer to each other in a circle."""
    if not documents:
        raise ConfigError(f"{source} is empty.", hint="A merge file begins with `merge_method:`.")
    parsed = [parse_config(document, source) for document in documents]
    if len(parsed) == 1:
        return parsed
    names = [options.name for options in parsed]
    doubled = [name for name in names if name is not None and names.count(name) > 1]
    if doubled or names.count(None) > 1:
        wrong = f"two documents are named `{doubled[0]}`" if doubled else "more than one document has no name"
        raise ConfigError(
            f"{source}: {wrong}.",
            hint="Give each document but the last its own `name:`.",
            param="name",
        )
    final = parsed[names.index(None)] if None in names else parsed[-1]
    pending, ordered = [options for options in parsed if options is not final], list[MergeOptions]()
    while pending:
        ready = [o for o in pending if not set(o.references()) & {other.name for other in pending}]
        if not ready:
            raise ConfigError(f"{source}: the documents {', '.join(str(o.name) for o in pending)} refer to each other.")
        ordered += ready
        pending = [options for options in pending if options not in ready]
    return [*ordered, final]


def _one(
    options: MergeOptions, source: str, folder: Path, run: MergeRun, known: Mapping[str, Checkpoint]
) -> MergedCheckpoint:
    models = {
        ref: known[ref] if ref in known else open_model(ref, folder, source, run.bare) for ref in options.references()
    }
    vocabulary: Vocabulary | None = join_vocabularies(options, models, source)
    planner = Planner(
        options, models, source, run.truncate_embeddings, vocabulary.size if vocabulary is not None else None
    )
    planner.warnings += vocabulary.warnings if vocabulary is not None else ()
    plan = planner.plan(seed=run.seed, compat=run.compat)
    config = dict(models[plan.donor].config)
    if plan.layers is not None:
        config = _with_depth(config, plan.layers)
    if vocabulary is not None:
        config["vocab_size"] = vocabulary.size
        if vocabulary.donor != plan.donor:
            ends = vocabulary.source.config
            config |= {k: ends[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in ends}
    elif run.truncate_embeddings:
        rows = [tensor.rows for tensor in plan.tensors if tensor.rows is not None]
        config |= {"vocab_size": rows[0]} if rows else {}
    if dtype := options.out_dtype or options.dtype:
        config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        config["torch_dtype"] = dtype
    return MergedCheckpoint(
        plan,
        models,
        reference=source,
        config=config,
        chat_template=chat_template(options.chat_template, list(models.values()), models[plan.donor]),
        vocabulary=vocabulary,
        threads=run.threads or available_threads(),
        allow_nonfinite=run.allow_nonfinite,
        data=_data(options, folder),
    )


def _data(options: MergeOptions, folder: Path) -> Texts | None:
    from gnomon.merge.perplexity import read_text

    def read(name: str) -> Data:
        path = folder / name
        return Data(str(read_text(path if path.exists() else Path(name))), options.data_tokens)

    own = {entry.model: read(entry.data) for entry in options.models or [] if entry.data is not None}
    if options.data is None and not own:
        return None
    return Texts(read(options.data) if options.data is not None else None, own)


def _with_depth(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config of a network of another depth."""
    key = next((k for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if k in config), None)
    changed = {**config, key or "num_hidden_layers": layers}
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) != layers:
        period = next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))
        changed["layer_types"] = [kinds[i % period] for i in range(layers)]
    return changed


def open_model(reference: str, folder: Path, source: str, bare: bool = False) -> Checkpoint:
    """A model of a merge file: a path (from the file's folder, else from here), or any model reference."""
    head, plus, adapters = reference.partition("+")
    near = folder / head
    if not near.exists() and not Path(head).exists() and "/" in head and ":" not in head:
        hub = head.count("/") == 1 and head[0] not in "./~"
        hint = f"A model of the Hugging Face hub is written hf:{head}." if hub else _looked_in(folder, head)
        raise ConfigError(f"{source}: there is no model `{head}`.", hint=hint, param="model")
    if bare and not adapters:
        from gnomon.merge.headers import BareCheckpoint, is_bare

        place = near if near.exists() else Path(head)
        if place.is_dir() and is_bare(place):
            return BareCheckpoint(place)
    place = Path(f"{near}{plus}{adapters}" if near.exists() else reference)
    if "/" in str(place) and place.is_dir():  # before what only other kinds of references need is loaded
        from gnomon.models.reference import open_path

        return open_path(place)
    from gnomon.loading import open_reference

    return open_reference(str(place))


def _looked_in(folder: Path, name: str) -> str:
    if Path(name).expanduser().is_absolute():
        return "The path is taken as it stands."
    places = dict.fromkeys(str(place.resolve()) for place in (folder, Path()))
    return f"Looked in {' and '.join(places)}."


@contextmanager
def _not_twice(path: Path) -> Iterator[None]:
    """Refuse a merge file that leads back to itself."""
    chain: list[Path] = _opening.__dict__.setdefault("chain", [])
    resolved = path.resolve()
    if resolved in chain:
        raise MergeError(f"{path} refers to itself: {' -> '.join(p.name for p in [*chain, resolved])}.")
    chain.append(resolved)
    try:
        yield
    finally:
        chain.pop()


@dataclass(frozen=True)
class Resolved:
    """What a merge file means as a model reference."""

    model: MergedCheckpoint
    defaults: dict[str, Any]


def resolve(ref: str | Path) -> Resolved | None:
    """Resolver hook: a .yaml file with `merge_method` at its top is the model that it merges."""
    path = Path(ref)
    if path.suffix not in SUFFIXES or not path.is_file() or not is_merge_file(path):
        return None
    return Resolved(open_merge(path), {})
