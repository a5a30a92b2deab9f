"""Ensemble: a Model over several members. generate, chat, stream, score, server and recipes work as with one model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from gnomon.capability import option_error
from gnomon.engine.certificate import Certificate
from gnomon.engine.request import Decision, Finished, Request, TokenEvent
from gnomon.engine.runner import PagedRunner, Runner
from gnomon.engine.worker import EngineWorker
from gnomon.ensemble.byte_runner import ByteRunner
from gnomon.ensemble.checkpoint import EnsembleCheckpoint
from gnomon.ensemble.member import Member
from gnomon.ensemble.options import EnsembleOptions, MemberOptions, Policy
from gnomon.ensemble.prompts import Prompt, conversation, understand
from gnomon.ensemble.runner import EnsembleRunner
from gnomon.ensemble.scoring import bits, byte_probabilities, fitting_weights, mixed
from gnomon.ensemble.shared import SharedRunner
from gnomon.ensemble.symbols import SymbolTokenizer, split_by
from gnomon.ensemble.told import Told
from gnomon.ensemble.trie import Floats
from gnomon.ensemble.union import TopUnionCore, UnionCore
from gnomon.errors import ConfigError, ContextLengthExceeded, PromptError, UnsupportedModel, UsageError
from gnomon.kernels.batch import PAGE
from gnomon.ledger import enabled
from gnomon.loading import LEDGER, load
from gnomon.model import Model
from gnomon.models.tokenizer import Tokenizer
from gnomon.patches.table import PatchTable
from gnomon.prompts import Messages

log = logging.getLogger("gnomon.ensemble")
VERSION = 1
"""Part of the fingerprint: raised when fusion changes by a bit."""
MemberLike = str | Path | Model | MemberOptions
DEFAULT_MEMORY = 1 << 30
"""Bytes of keys and values per member; what is over is computed again when it is needed."""


class Ensemble(Model):
    """Several models as one. members: references, loaded Models (kept open), or MemberOptions, in order.

    core: "union" (GaC), "topk" (UniTE) or "byte"; members of one vocabulary are fused directly unless a core is named.
    The other keywords are the fields of EnsembleOptions. Raises UsageError and whatever `gnomon.load` raises.
    """

    reporting: Mapping[str, Any] = {**Model.reporting, "ensemble": {"trace": True}}

    def __init__(
        self,
        members: Sequence[MemberLike],
        *,
        core: str | None = None,
        weights: Sequence[float] | None = None,
        fuse: str = "arithmetic",
        when: str = "every",
        primary: str | int | None = None,
        threshold: float | None = None,
        name: str | None = None,
        profile: str | None = None,
        threads: int | None = None,
        kv_memory: int | None = None,
        max_sequences: int = 64,
        token_budget: int = 256,
        max_context: int | None = None,
        defaults: Mapping[str, Any] | None = None,
        ledger: bool | None = None,
        **more: Any,
    ) -> None:
        given = {"core": core, "fuse": fuse, "when": when, "primary": primary, "threshold": threshold, **more}
        self.options = check_options({**given, "weights": None if weights is None else list(weights)})
        if isinstance(members, str) or not members:
            raise UsageError("An ensemble needs a list of members.", hint="Give models.", param="ensemble.members")
        self._owned: list[Model] = []
        self.trace: list[dict[str, Any]] = []
        try:
            self.models = [self._opened(member, profile, threads) for member in members]
            self._names = _distinct([_name_of(m, model) for m, model in zip(members, self.models, strict=True)])
            self.policy = _policy(self.options, self._names, members)
            runner, tokenizer = self._runner(kv_memory, max_sequences, token_budget, max_context)
            identity = self._identity()
            worker = EngineWorker(
                runner,
                fingerprint=identity,
                max_sequences=max_sequences,
                token_budget=token_budget,
            )
        except BaseException:
            self._close_owned()
            raise
        self._fingerprint = "fp_" + identity[:12]
        title = name or "+".join(self._names)
        reference = _reference(members, self.options)
        super().__init__(
            EnsembleCheckpoint(title, reference, identity, tokenizer, self._names),
            worker=worker,
            defaults=defaults,
            chat_template=self._shared_template(),
            open_model=load,
            observer=LEDGER.add if (enabled() if ledger is None else ledger) else None,
        )
        self._note_what_is_odd()

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def patches(self) -> PatchTable:
        raise UnsupportedModel(
            f"`{self.name}` is an ensemble: a patch belongs to one member.",
            hint="Name it in that member's reference (BASE+PATCH), or give a member `model.with_patches([...])`.",
        )

    @property
    def can_chat(self) -> bool:
        return any(model.can_chat for model in self.models)

    @property
    def member_names(self) -> list[str]:
        return list(self._names)

    @property
    def members(self) -> list[Member]:
        """The members with vocabularies of their own; empty where all share one."""
        return list(self._members)

    def certificate(self, *, renew: bool = False) -> Certificate:
        """The members' certificates as one: it passes when all do."""
        found = [model.certificate(renew=renew) for model in self.models]
        joined = "".join(certificate.digest for certificate in found)
        return replace(
            found[0],
            fingerprint=self.fingerprint,
            profile={"members": {n: c.profile for n, c in zip(self._names, found, strict=True)}},
            probes=tuple(probe for certificate in found for probe in certificate.probes),
            digest=hashlib.sha256(joined.encode()).hexdigest(),
            seconds=sum(certificate.seconds for certificate in found),
            covered=all(certificate.covered for certificate in found),
        )

    def render(self, messages: str | Messages, **variables: Any) -> list[int]:
        """A conversation as symbols; each member renders it with its own template later."""
        if self._shared is not None:
            return super().render(messages, **variables)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        given = {key: value for key, value in variables.items() if value is not None}
        ids = conversation(self._symbol_tokenizer, messages, given)
        prompt, _ = understand(self._symbol_tokenizer.symbols, ids, None)
        for member in self._members:  # a template that refuses these messages is an error now
            member.prompt_ids(prompt)
        return ids

    # -- bytes --------------------------------------------------------------------------------------------------

    def next_bytes(self, prefix: bytes) -> list[float]:
        """Probabilities of the 256 next bytes after a raw text, and of the end (the last): the byte core's."""
        runner = self._bytes()
        return [float(p) for p in self.worker.run_exclusive(lambda: runner.next_bytes(bytes(prefix)))]

    def byte_probabilities(self, text: str, prompt: str = "") -> dict[str, list[float]]:
        """What every member thinks of each byte of a text after a prompt, and last of its end: by member."""
        runner = self._bytes()
        found = {}
        for m, member in enumerate(self._members):
            context = member.prompt_ids(Prompt(prompt.encode())) if prompt else member.start_ids()
            scored = self.worker.run_exclusive(partial(self._scored, runner, m, context, text.encode("utf-8")))
            found[member.name] = [float(p) for p in scored]
        return found

    def bits_per_byte(self, text: str, prompt: str = "") -> float:
        """Bits per byte of a text under the mixture; lower is better, and comparable between any tokenizers."""
        if not text:
            raise PromptError("The text is empty.", param="text")
        if self.policy.fuse != "arithmetic":
            raise UsageError("bits_per_byte is of the arithmetic mixture.", param="ensemble.fuse")
        by_member = [np.array(values[:-1]) for values in self.byte_probabilities(text, prompt).values()]
        return bits(mixed(by_member, self.policy.weights))

    def _scored(self, runner: ByteRunner, m: int, context: list[int], data: bytes) -> Floats:
        return byte_probabilities(self._members[m], runner.lattice(m), context, data)

    def _bytes(self) -> ByteRunner:
        if self._byte_core is None:
            raise UsageError("Next bytes are the byte core's.", hint="Open it with core='byte'.", param="ensemble.core")
        return self._byte_core

    def _prepare(self, request: Request, parsed: Mapping[str, Any]) -> None:
        asked: EnsembleOptions | None = parsed.get("ensemble")
        if len(self._names) == 1 and self._shared is not None:
            return
        policy, merged = self.policy, self.options
        if asked is not None:
            merged = self.options.model_copy(update={key: getattr(asked, key) for key in asked.model_fields_set})
            policy = Policy.of(merged, self._names, self.policy.weights)
            if self._shared is not None and policy.when != "every":
                raise UsageError(
                    f"`when: {policy.when}` cannot be set per request here: these members share one vocabulary and run "
                    "together.",
                    hint="Open the ensemble with core='union'.",
                    param="ensemble.when",
                )
        masked = bool(request.mask) or bool(request.bias)
        told = Told(self._names, policy, len(request.prompt_ids), None, request.cache_salt, masked, merged.trace)
        if self._shared is None:
            told.prompts = self._prompts_of(request)
            if merged.weigh == "perplexity":
                told.policy = replace(policy, weights=tuple(self._fitting(told.prompts, merged.sharpness)))
        elif merged.weigh == "perplexity":
            raise UsageError(
                "`weigh: perplexity` needs members that run apart.",
                hint="Open the ensemble with core='union'.",
                param="ensemble.weigh",
            )
        request.runner_options = told
        on_token, on_finish, length = request.on_token, request.on_finish, len(request.prompt_ids)

        def token(event: TokenEvent) -> Decision:
            noted = told.token(event.token_id, length + event.index)
            return on_token(replace(event, trace=noted) if noted else event)

        def finish(finished: Finished) -> None:
            if merged.trace:
                self.trace = told.record
            on_finish(replace(finished, details=told.usage()))

        request.on_token, request.on_finish = token, finish

    def _fitting(self, prompts: Sequence[Sequence[int]], sharpness: float) -> list[float]:
        """Votes from how well a prompt suits each member."""

        def measure() -> list[float]:
            return [m.prompt_bits(ids, 64) for m, ids in zip(self._members, prompts, strict=True)]

        return fitting_weights(self.worker.run_exclusive(measure), sharpness)

    def _prompts_of(self, request: Request) -> list[list[int]]:
        """The prompt in every member's tokens. Raises ContextLengthExceeded naming the member it is too long for."""
        prompt, _ = understand(self._symbol_tokenizer.symbols, request.prompt_ids, len(request.prompt_ids))
        found = []
        for member in self._members:
            ids = member.prompt_ids(prompt) or member.start_ids()
            if len(ids) >= member.max_context:
                raise ContextLengthExceeded(
                    f"The prompt has {len(ids)} tokens for the member `{member.name}`; its context holds "
                    f"{member.max_context}.",
                    param="prompt",
                )
            found.append(ids)
        return found

    def _shared_template(self) -> str | None:
        """Members of one vocabulary read the primary's conversation."""
        leader = self.models[self.policy.primary]
        return leader.template.source if self._shared is not None and leader.can_chat else None

    # -- how it is built ----------------------------------------------------------------------------------------

    def _opened(self, member: MemberLike, profile: str | None, threads: int | None) -> Model:
        if isinstance(member, Model):
            model = member
        else:
            entry = member if isinstance(member, MemberOptions) else MemberOptions(model=str(member))
            template = _read_template(entry.chat_template)
            model = load(
                entry.model,
                profile=entry.profile or profile,
                threads=threads,
                chat_template=template,
                max_sequences=1,
                ledger=False,
            )
            self._owned.append(model)
        if model.network is None:
            what = "an ensemble itself" if isinstance(model, Ensemble) else "an embedding model"
            raise UnsupportedModel(f"`{model.name}` cannot be a member: it is {what}.")
        return model

    def _runner(
        self, kv_memory: int | None, max_sequences: int, token_budget: int, max_context: int | None
    ) -> tuple[Runner, Tokenizer]:
        networks = [model.network for model in self.models if model.network is not None]
        self._members: list[Member] = []
        self._shared: Runner | None = None
        self._byte_core: ByteRunner | None = None
        memory = (kv_memory or DEFAULT_MEMORY * len(networks)) // len(networks)
        if len(networks) == 1 and self.options.core is None and not self.models[0].sides:
            pages = max(1, memory // networks[0].page_bytes)
            self._shared = PagedRunner(networks[0], page_count=pages, max_context=max_context)
            return self._shared, self.models[0].tokenizer
        if self.options.core is None and self.policy.when == "every" and _same_vocabulary(self.models):
            pages = max(1, memory // max(network.page_bytes for network in networks))
            self._shared = SharedRunner(networks, self.policy, page_count=pages, max_context=max_context)
            return self._shared, self.models[self.policy.primary].tokenizer
        for name, model, network in zip(self._names, self.models, networks, strict=True):
            context = min(network.max_context, max_context or network.max_context)
            pages = max(memory // network.page_bytes, -(-context // PAGE) if kv_memory is None else 1)
            self._members.append(
                Member(
                    name,
                    network,
                    model.tokenizer,
                    fingerprint=model.fingerprint,
                    chat_template=model.template.source if model.can_chat else None,
                    page_count=min(pages, max_sequences * -(-context // PAGE)),
                    max_context=max_context,
                    sides=model.sides,
                )
            )
        _check_stops(self._members)
        return self._virtual_runner(max_sequences, token_budget)

    def _virtual_runner(self, max_sequences: int, token_budget: int) -> tuple[Runner, Tokenizer]:
        core = self.options.core or "union"
        if core == "byte":
            return self._byte_runner(max_sequences, token_budget)
        symbols = UnionCore.vocabulary(self._members)
        renormalize = self.options.renormalize
        made = (
            TopUnionCore(self._members, symbols, renormalize=renormalize, top=self.options.top)
            if core == "topk"
            else UnionCore(self._members, symbols, renormalize=renormalize)
        )
        runner = EnsembleRunner(
            self._members,
            made,
            self.policy,
            token_budget=token_budget,
            max_sequences=max_sequences,
            on_failure=self.options.on_failure,
        )
        primary = self._members[self.policy.primary]
        texts = primary.retokenizer.texts
        split = split_by(lambda text: [texts[i] for i in primary.retokenizer.ids(text.encode())], symbols)
        self._symbol_tokenizer = SymbolTokenizer(symbols, split, core)
        return runner, self._symbol_tokenizer

    def _byte_runner(self, max_sequences: int, token_budget: int) -> tuple[Runner, Tokenizer]:
        if self.policy.when != "every":
            raise UsageError(
                "The byte core asks every member for every byte.", hint="Use `when: every`.", param="ensemble.when"
            )
        self._byte_core = runner = ByteRunner(
            self._members, self.policy, self.options, token_budget=token_budget, max_sequences=max_sequences
        )
        self._symbol_tokenizer = SymbolTokenizer(runner.symbols, lambda text: list(text.encode("utf-8")), "byte")
        return runner, self._symbol_tokenizer

    def _identity(self) -> str:
        """sha256 over everything that can change a bit: members' fingerprints, fusion, and torch's arithmetic."""
        if len(self.models) == 1 and self._shared is not None:
            return hashlib.sha256(self.models[0].fingerprint.encode()).hexdigest()
        described = {
            "version": VERSION,
            "members": [model.fingerprint for model in self.models],
            "options": self.options.model_dump(mode="json", exclude={"members", "trace"}),
            "policy": list(self.policy.weights),
            "torch": [torch.__version__, torch.backends.cpu.get_cpu_capability()],
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def _note_what_is_odd(self) -> None:
        prints = [model.fingerprint for model in self.models]
        if len(prints) == 1:
            log.warning("One member: the ensemble is `%s` itself, bit for bit.", self._names[0])
        elif len(set(prints)) == 1:
            log.warning("All members are the same model: the ensemble equals it up to the rounding of the mean.")
        if self.can_chat:
            for name, model in zip(self._names, self.models, strict=True):
                if not model.can_chat and self._shared is None:
                    log.warning("`%s` has no chat template: it reads conversations as a plain transcript.", name)

    # -- life ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the ensemble, and the members that it opened itself."""
        super().close()
        self._close_owned()

    def _close_owned(self) -> None:
        for model in self._owned:
            model.close()
        self._owned = []


def check_options(values: Mapping[str, Any]) -> EnsembleOptions:
    """Keywords as options. Raises UsageError with the field's path."""
    try:
        return EnsembleOptions.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise option_error(error, ("ensemble",)) from None


def _policy(options: EnsembleOptions, names: Sequence[str], members: Sequence[MemberLike]) -> Policy:
    """The policy, with votes and primary that stand beside members. Raises UsageError for two primaries."""
    entries = [member for member in members if isinstance(member, MemberOptions)]
    leaders = [place for place, m in enumerate(members) if isinstance(m, MemberOptions) and m.primary]
    if len(leaders) > 1 or (leaders and options.primary is not None):
        raise UsageError("The ensemble has two primaries.", hint="Mark one member.", param="ensemble.primary")
    if leaders:
        options = options.model_copy(update={"primary": leaders[0]})
    beside = None
    if any(entry.weight is not None for entry in entries):
        if options.weights is not None:
            raise UsageError(
                "Weights stand both in `weights` and beside members.", hint="Keep one.", param="ensemble.weights"
            )
        beside = [m.weight if isinstance(m, MemberOptions) and m.weight is not None else 1.0 for m in members]
    policy = Policy.of(options, names, beside)
    given = options.weights or beside
    if given and abs(sum(given) - 1) > 1e-9:
        log.info("Weights %s are normalised to %s.", given, [round(w, 4) for w in policy.weights])
    return policy


def _same_vocabulary(models: Sequence[Model]) -> bool:
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


def _check_stops(members: Sequence[Member]) -> None:
    for member in members:
        if not member.stops:
            raise UnsupportedModel(
                f"The member `{member.name}` has no token that ends a text, so the members share no stop symbol.",
                hint="Its generation_config.json should name eos_token_id.",
            )


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {path} cannot be read: {error}.", param="ensemble.members") from None


def _name_of(member: MemberLike, model: Model) -> str:
    return member.name if isinstance(member, MemberOptions) and member.name else model.name


def _distinct(names: Sequence[str]) -> list[str]:
    """Names that can be told apart: the second `a` is `a#2`."""
    found: list[str] = []
    for name in names:
        count = sum(other == name or other.startswith(f"{name}#") for other in found)
        found.append(name if not count else f"{name}#{count + 1}")
    return found


def _reference(members: Sequence[MemberLike], options: EnsembleOptions) -> str:
    """A reference that opens this ensemble again: `ensemble:` and its options as JSON."""
    entries = [
        member.checkpoint.reference
        if isinstance(member, Model)
        else member.model_dump(exclude_defaults=True)
        if isinstance(member, MemberOptions)
        else str(member)
        for member in members
    ]
    said = options.model_dump(mode="json", exclude_defaults=True)
    return "ensemble:" + json.dumps({**said, "members": entries}, sort_keys=True)
