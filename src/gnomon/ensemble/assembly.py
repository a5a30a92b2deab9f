"""What stands behind an ensemble: members with pages of their own, the runner over them, its (virtual) tokenizer.

Members of one vocabulary share a runner and page numbers; one plain model is its own runner; everybody else stands
behind a virtual vocabulary, as the core wants it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gnomon.arch.network import Network
from gnomon.engine.runner import PagedRunner, Runner
from gnomon.ensemble.byte_runner import ByteRunner
from gnomon.ensemble.language import check_language
from gnomon.ensemble.member import Member
from gnomon.ensemble.options import EnsembleOptions, Policy
from gnomon.ensemble.safe import SafeRunner
from gnomon.ensemble.shared import SharedRunner
from gnomon.ensemble.symbols import SymbolTokenizer, split_by
from gnomon.ensemble.union import TopUnionCore, UnionCore
from gnomon.errors import UsageError
from gnomon.kernels.batch import PAGE
from gnomon.model import Model
from gnomon.models.tokenizer import Tokenizer

VERSION = 2
"""Part of the fingerprint: raised when fusion changes by a bit."""
DEFAULT_MEMORY = 1 << 30
"""Bytes of keys and values per member; what is over is computed again when it is needed."""


@dataclass(frozen=True)
class Limits:
    """kv_memory: bytes for all members. The others as for any engine."""

    kv_memory: int | None = None
    max_sequences: int = 64
    token_budget: int = 256
    max_context: int | None = None


@dataclass(frozen=True)
class Assembly:
    """members: those behind a virtual vocabulary; none where all share one (`shared`)."""

    runner: Runner
    tokenizer: Tokenizer
    members: tuple[Member, ...] = ()

    @property
    def shared(self) -> bool:
        return not self.members

    @property
    def symbols(self) -> SymbolTokenizer:
        """The virtual vocabulary's tokenizer."""
        assert isinstance(self.tokenizer, SymbolTokenizer)
        return self.tokenizer


def assemble(
    models: Sequence[Model], names: Sequence[str], policy: Policy, options: EnsembleOptions, limits: Limits
) -> Assembly:
    """Raises UsageError and UnsupportedModel for members that cannot speak together."""
    networks = [model.network for model in models if model.network is not None]
    memory = (limits.kv_memory or DEFAULT_MEMORY * len(networks)) // len(networks)
    context = limits.max_context
    if len(networks) == 1 and options.core is None and not models[0].sides:
        pages = max(1, memory // networks[0].page_bytes)
        return Assembly(PagedRunner(networks[0], page_count=pages, max_context=context), models[0].tokenizer)
    if options.core is None and policy.when == "every" and same_vocabulary(models):
        pages = max(1, memory // max(network.page_bytes for network in networks))
        runner = SharedRunner(networks, policy, page_count=pages, max_context=context)
        return Assembly(runner, models[policy.primary].tokenizer)
    members = [
        _member(name, model, network, memory, limits)
        for name, model, network in zip(names, models, networks, strict=True)
    ]
    check_language(members)
    return (
        _bytes(members, policy, options, limits) if options.core == "byte" else _union(members, policy, options, limits)
    )


def _member(name: str, model: Model, network: Network, memory: int, limits: Limits) -> Member:
    context = min(network.max_context, limits.max_context or network.max_context)
    pages = max(memory // network.page_bytes, -(-context // PAGE) if limits.kv_memory is None else 1)
    return Member(
        name,
        network,
        model.tokenizer,
        fingerprint=model.fingerprint,
        chat_template=model.template.source if model.can_chat else None,
        page_count=min(pages, limits.max_sequences * -(-context // PAGE)),
        max_context=limits.max_context,
        sides=model.sides,
    )


def _union(members: list[Member], policy: Policy, options: EnsembleOptions, limits: Limits) -> Assembly:
    core = options.core or "union"
    symbols, renormalize = UnionCore.vocabulary(members), options.renormalize
    made = (
        TopUnionCore(members, symbols, renormalize=renormalize, top=options.top)
        if core == "topk"
        else UnionCore(members, symbols, renormalize=renormalize)
    )
    runner = SafeRunner(
        members,
        made,
        policy,
        token_budget=limits.token_budget,
        max_sequences=limits.max_sequences,
        on_failure=options.on_failure,
    )
    primary = members[policy.primary].retokenizer
    split = split_by(lambda text: [primary.texts[i] for i in primary.ids(text.encode())], symbols)
    return Assembly(runner, SymbolTokenizer(symbols, split, core), tuple(members))


def _bytes(members: list[Member], policy: Policy, options: EnsembleOptions, limits: Limits) -> Assembly:
    if policy.when != "every":
        raise UsageError(
            "The byte core asks every member for every byte.", hint="Use `when: every`.", param="ensemble.when"
        )
    runner = ByteRunner(members, policy, options, token_budget=limits.token_budget, max_sequences=limits.max_sequences)
    tokenizer = SymbolTokenizer(runner.symbols, lambda text: list(text.encode("utf-8")), "byte")
    return Assembly(runner, tokenizer, tuple(members))


def identity(models: Sequence[Model], assembly: Assembly, policy: Policy, options: EnsembleOptions) -> str:
    """sha256 over everything that can change a bit: members' fingerprints, fusion, and torch's arithmetic."""
    if len(models) == 1 and assembly.shared:
        return hashlib.sha256(models[0].fingerprint.encode()).hexdigest()
    described = {
        "version": VERSION,
        "members": [model.fingerprint for model in models],
        "options": options.model_dump(mode="json", exclude={"members", "trace"}),
        "policy": list(policy.weights),
        "torch": [torch.__version__, torch.backends.cpu.get_cpu_capability()],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def same_vocabulary(models: Sequence[Model]) -> bool:
    """Whether the members' rows can be fused as they are."""
    if not all(getattr(model.network, "shares_pages", True) and not model.sides for model in models):
        return False
    first = models[0].tokenizer
    if all(model.tokenizer.sha256 == first.sha256 for model in models[1:]):
        return True
    sizes = {model.tokenizer.vocab_size for model in models}
    return len(sizes) == 1 and all(
        model.tokenizer.eos_token_ids == first.eos_token_ids
        and all(model.tokenizer.token_bytes(i) == first.token_bytes(i) for i in range(first.vocab_size))
        for model in models[1:]
    )
