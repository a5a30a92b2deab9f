"""`gnomon.load`: from a model reference to a running Model.

Resolvers (recipes, merge files, ensembles) turn a reference into a model and defaults; then checkpoint, network,
numeric profile and engine follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnomon.arch.config import FAMILIES
from gnomon.arch.decoder import Decoder
from gnomon.arch.network import Network, build_network
from gnomon.arch.verified_network import VerifiedNetwork
from gnomon.capability import Resolved, load_attribute
from gnomon.engine.draft_model import DraftModel
from gnomon.engine.drafting import Drafter, PromptLookup
from gnomon.engine.fast_drafter import FastDrafter
from gnomon.engine.memory import give_back
from gnomon.engine.runner import PagedRunner
from gnomon.engine.worker import EngineWorker
from gnomon.errors import UsageError
from gnomon.kernels import kernel_name, make_operators
from gnomon.kernels.batch import PAGE
from gnomon.kernels.operators import Operators
from gnomon.kernels.profile import NumericProfile
from gnomon.ledger import Ledger, enabled
from gnomon.model import Model
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.reference import open_checkpoint
from gnomon.models.zoo import DEFAULT_MODEL
from gnomon.registry import Registry

if TYPE_CHECKING:
    import torch

LEDGER = Ledger()
SENTINEL_EVERY = 500
"""One request in so many is decoded twice and compared."""
SPECULATION = {"lookup": PromptLookup, "off": None}
MOST_SEQUENCES, TOKEN_BUDGET = 64, 256
PROFILES = ("fp32", "bf16", "int8", "gguf")


@dataclass(frozen=True)
class LoadSettings:
    """What `load` was asked, handed on to a resolver that opens its model itself."""

    profile: str | None = None
    dtype: Any = None
    threads: int | None = None
    chat_template: str | None = None
    defaults: Mapping[str, Any] | None = None
    kv_memory: int | None = None
    max_sequences: int = 64
    token_budget: int = 256
    max_context: int | None = None
    ledger: bool | None = None


ENCODERS = ("BertModel", "BertForMaskedLM", "RobertaModel", "XLMRobertaModel")


def load(
    ref: str | Path | Checkpoint | None = None,
    *,
    profile: str | None = None,
    dtype: str | torch.dtype | None = None,
    threads: int | None = None,
    device: str | None = None,
    chat_template: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    kv_memory: int | None = None,
    max_sequences: int | None = None,
    token_budget: int | None = None,
    max_context: int | None = None,
    speculation: str = "lookup",
    ledger: bool | None = None,
    kernel: str | None = None,
    determinism: str | None = None,
) -> Model:
    """Open a model by reference; a missing free zoo model is fetched, with progress.

    ref: zoo name, directory, .gguf file, hf:, pip:, recipe or merge file, or a Checkpoint in memory (patched, merged);
    default smollm2-135m-instruct.
    profile (alias dtype): "fp32" | "bf16" | "int8" | "gguf" | "auto" (the default: see `default_profile`). defaults:
    option values used where a call gives none.
    kv_memory: bytes for keys and values (default: what max_sequences need, at most a quarter of free memory).
    max_sequences, token_budget: sequences decoded at once (64), tokens computed in one step (256).
    max_context: refuse longer sequences than this, below the model's own limit.
    A recipe's profile, threads, device and engine keys hold where the call says nothing.
    speculation: where drafts come from, which the model then confirms (the same output, sooner): "lookup" (the text so
    far) | "draft" (these weights in fewer bits) | "draft:REF" (another model of the same vocabulary) | "off".
    ledger: note every generation in the ledger, to be replayed (default: yes, unless GNOMON_LEDGER=0).
    determinism: "exact" (refuse a network without canonical operators) | "verified" (such a network in one fixed shape,
    fast drafts confirmed: docs/determinism.md) | "fast" (such a network as it is). Default: exact where it can be.
    Raises ModelNotFound, FetchError, CheckpointError, UnsupportedModel, UsageError.
    """
    found = Resolved(ref, {}) if isinstance(ref, Checkpoint) else _resolve(DEFAULT_MODEL if ref is None else ref)
    own = found.settings
    if profile is None and dtype is None:
        profile = own.get("profile")
    threads = own.get("threads") if threads is None else threads
    device = own.get("device") if device is None else device
    determinism = own.get("determinism") if determinism is None else determinism
    kv_memory = own.get("kv_memory") if kv_memory is None else kv_memory
    max_sequences = own.get("max_sequences", MOST_SEQUENCES) if max_sequences is None else max_sequences
    token_budget = own.get("token_budget", TOKEN_BUDGET) if token_budget is None else token_budget
    max_context = own.get("max_context") if max_context is None else max_context
    chosen = _profile_name(profile, dtype)
    if found.open is not None:  # an ensemble: several models, opened by its own room
        _only_on_cpu(device, "An ensemble")
        drafts = None if speculation == "lookup" else speculation
        _not_taken("An ensemble", kernel=kernel, determinism=determinism, speculation=drafts)
        settings = LoadSettings(
            profile,
            dtype,
            threads,
            chat_template,
            {**found.defaults, **(defaults or {})},
            kv_memory,
            max_sequences,
            token_budget,
            max_context,
            ledger,
        )
        opened: Model = found.open(settings)
        return opened
    source, own_defaults = found.model, dict(found.defaults)
    checkpoint = open_checkpoint(source) if isinstance(source, str | Path) else source
    merged = {**own_defaults, **(defaults or {})}
    template = chat_template if chat_template is not None else merged.pop("chat_template", None)
    merged.pop("chat_template", None)
    if checkpoint.config.get("architectures", [""])[0] in ENCODERS:
        _only_on_cpu(device, "An embedding model")
        _not_taken(
            "An embedding model",
            profile=None if chosen in (None, "fp32") else chosen,
            kernel=kernel,
            determinism=determinism,
            speculation=None if speculation == "lookup" else speculation,
            kv_memory=kv_memory,
            max_sequences=None if max_sequences == MOST_SEQUENCES else max_sequences,
            token_budget=None if token_budget == TOKEN_BUDGET else token_budget,
            max_context=max_context,
        )
        from gnomon.arch.encoder import build_encoder

        return Model(checkpoint, encoder=build_encoder(checkpoint, threads), defaults=merged, open_model=load)
    if chosen is None:
        chosen = default_profile(checkpoint, kernel, device)
    ops = make_operators(chosen, kernel=kernel, threads=threads, device=device)
    if chosen == "gguf" and not checkpoint.has_blocks:
        raise UsageError(
            f"`{checkpoint.reference}` has no quantised blocks for the gguf profile to run.",
            hint="Use int8, bf16 or fp32, or a .gguf file.",
            param="profile",
        )
    network = _build(checkpoint, ops, determinism)
    if not isinstance(network, Decoder):
        _only_on_cpu(device, f"`{network.architecture}`, which is not one of gnomon's own networks,")
    give_back()
    profile_of = NumericProfile.of(checkpoint.identity, network.architecture, ops)
    drafter: Callable[[], Drafter] | None = None
    if isinstance(network, VerifiedNetwork):
        profile_of = replace(profile_of, kernel="verified", kernel_details=network.description())
        drafter = partial(FastDrafter, network) if speculation == "lookup" else None
    worker = start_engine(
        network,
        fingerprint=profile_of.fingerprint,
        kv_memory=kv_memory,
        max_sequences=max_sequences,
        token_budget=token_budget,
        max_context=max_context,
        speculation=speculation,
        draft=_draft_model(speculation, checkpoint, network, threads, max_context),
        drafter=drafter,
    )
    model = Model(
        checkpoint,
        network=network,
        worker=worker,
        profile=profile_of,
        defaults=merged,
        chat_template=template,
        open_model=load,
        observer=LEDGER.add if (enabled() if ledger is None else ledger) else None,
    )
    if merged:
        model.fingerprint_of({})  # patches that the defaults ask for are made now, not at the first request
    return model


def start_engine(
    network: Network,
    *,
    fingerprint: str,
    kv_memory: int | None = None,
    max_sequences: int = 64,
    token_budget: int = 256,
    max_context: int | None = None,
    speculation: str = "lookup",
    draft: DraftModel | None = None,
    drafter: Callable[[], Drafter] | None = None,
) -> EngineWorker:
    """An engine thread over a network, with key-value pages for what it may run at once."""
    if draft is None and speculation not in SPECULATION:
        known = [*SPECULATION, "draft", "draft:REF"]
        raise UsageError(
            f"Unknown speculation `{speculation}`.", hint=f"Known: {', '.join(known)}.", param="speculation"
        )
    context = min(network.max_context, max_context or network.max_context)
    per_sequence = -(-context // PAGE)
    if kv_memory is None:
        wanted = per_sequence * max_sequences * network.page_bytes
        free = getattr(getattr(network, "operators", None), "free_memory", _free_memory)()
        kv_memory = max(per_sequence * network.page_bytes, min(wanted, free // 4))
    pages = kv_memory // network.page_bytes
    if pages < 1:
        raise UsageError(
            f"kv_memory {kv_memory} bytes holds no page ({network.page_bytes} bytes each).", param="kv_memory"
        )
    return EngineWorker(
        PagedRunner(network, page_count=pages, max_context=context),
        fingerprint=fingerprint,
        max_sequences=max_sequences,
        token_budget=token_budget,
        drafter=drafter or (SPECULATION[speculation] if draft is None else draft.drafter),
        sentinel_every=SENTINEL_EVERY,
    )


def _build(checkpoint: Checkpoint, operators: Operators, determinism: str | None) -> Network:
    """The network, with the kind of determinism that was asked for; what cannot be had is refused."""
    if determinism not in (None, "exact", "verified", "fast"):
        raise UsageError(
            f"Unknown determinism `{determinism}`.", hint="Known: exact, verified, fast.", param="determinism"
        )
    name = (checkpoint.config.get("architectures") or ["(none)"])[0]
    if determinism == "verified":
        if name in FAMILIES:
            raise UsageError(f"`{name}` is exact already: it needs no verifying.", param="determinism")
        return VerifiedNetwork(checkpoint, operators)
    if determinism == "exact" and name not in FAMILIES:
        raise UsageError(
            f"`{name}` runs through transformers, which cannot promise exact bits.",
            hint="Use determinism='verified'.",
            param="determinism",
        )
    return build_network(checkpoint, operators)


def _not_taken(what: str, **said: Any) -> None:
    """Refuse by name what was said and would be ignored."""
    for name, value in said.items():
        if value is not None:
            raise UsageError(f"{what} does not take `{name}`.", hint="Leave it out.", param=name)


def _only_on_cpu(device: str | None, what: str) -> None:
    if device not in (None, "cpu"):
        raise UsageError(f"{what} does not run on device `{device}`.", hint="Use device='cpu'.", param="device")


def _draft_model(
    speculation: str, checkpoint: Checkpoint, network: Network, threads: int | None, max_context: int | None
) -> DraftModel | None:
    """What guesses for speculation="draft" and "draft:REF", in the profile that decodes fastest; None otherwise."""
    kind, _, reference = speculation.partition(":")
    if kind != "draft":
        return None
    source = open_checkpoint(reference) if reference else checkpoint
    guesser = build_network(source, make_operators("gguf" if source.has_blocks else "int8", threads=threads))
    if guesser.vocab_size != network.vocab_size:
        raise UsageError(
            f"The draft model `{source.reference}` has {guesser.vocab_size} tokens, this one {network.vocab_size}.",
            hint="Draft with a model of the same family, or with speculation='draft'.",
            param="speculation",
        )
    return DraftModel(guesser, max_context or network.max_context)


def _free_memory() -> int:
    """Bytes of memory that are free now; 4 GiB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


def default_profile(checkpoint: Checkpoint, kernel: str | None = None, device: str | None = None) -> str:
    """The profile of who names none: bf16 for weights stored in 16 bits or fewer, fp32 for weights stored in 32.

    bf16 rounds stored weights only and computes in float32, so weights stored in bfloat16 lose nothing by it, and
    others less than bfloat16 arithmetic takes elsewhere (docs/kernels.md, Which profile). Pure-torch kernels and
    networks of transformers compute in fp32: bf16 would be no faster there.
    """
    name = (checkpoint.config.get("architectures") or ["(none)"])[0]
    if name not in FAMILIES or (device in (None, "cpu") and kernel_name(kernel) == "torch"):
        return "fp32"
    wide = not checkpoint.has_blocks and all(checkpoint.info(tensor).dtype == "float32" for tensor in checkpoint)
    return "fp32" if wide else "bf16"


def _profile_name(profile: str | None, dtype: Any) -> str | None:
    """The numeric profile's name from `profile=` or its alias `dtype=` (a name or a torch dtype); None: the default."""
    if profile is not None and dtype is not None and profile != _spelling(dtype):
        raise UsageError(f"profile `{profile}` and dtype `{dtype}` disagree.", param="dtype")
    said = profile if profile is not None else dtype
    if said in (None, "auto"):
        return None
    name = _spelling(said)
    if name not in PROFILES:
        raise UsageError(f"Unknown profile `{name}`.", hint=f"Known: {', '.join(PROFILES)}, auto.", param="profile")
    return name


def _spelling(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "float": "fp32", "bfloat16": "bf16"}.get(name, name)


def open_reference(ref: str | Path, *, fetch: bool = True) -> Checkpoint:
    """Any reference as a checkpoint, recipes and merge files included (their option defaults left aside)."""
    found = _resolve(ref)
    if found.open is not None:
        raise UsageError(f"`{ref}` is several models, not one checkpoint.", hint="Name one of its members.")
    source: Checkpoint | str | Path = found.model
    return open_checkpoint(source, fetch=fetch) if isinstance(source, str | Path) else source


def _resolve(ref: str | Path | Checkpoint) -> Resolved:
    """Let registered resolvers (recipe, merge file, ensemble) turn a reference into a model and its defaults.

    What a resolver gives may itself be a reference to resolve: a recipe's `model: merge.yaml`.
    """
    source: Any = ref
    defaults: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    seen: list[str] = []
    while isinstance(source, str | Path):
        if str(source) in seen:
            raise UsageError(f"References lead in a circle: {' -> '.join([*seen, str(source)])}.", param="model")
        seen.append(str(source))
        found = _resolve_once(source)
        if found is None:
            break
        source, defaults = found.model, {**found.defaults, **defaults}
        settings = {**getattr(found, "settings", {}), **settings}
        if (opening := getattr(found, "open", None)) is not None:
            return Resolved(source, defaults, opening, settings)
    return Resolved(source, defaults, settings=settings)


def _resolve_once(ref: str | Path) -> Any:
    for capability in Registry.installed().capabilities.values():
        if capability.resolver and (found := load_attribute(capability.resolver)(ref)) is not None:
            return found
    return None
