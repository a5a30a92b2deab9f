"""Ensemble: a Model over several members. generate, chat, stream, score, server and recipes work as with one model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gnomon.engine.certificate import Certificate
from gnomon.engine.request import Decision, Finished, Request, TokenEvent
from gnomon.engine.worker import EngineWorker
from gnomon.ensemble.assembly import Limits, assemble, identity
from gnomon.ensemble.byte_runner import ByteRunner
from gnomon.ensemble.checkpoint import EnsembleCheckpoint
from gnomon.ensemble.member import Member
from gnomon.ensemble.opening import MemberLike, check_options, names_of, open_member, policy_of, reference_of
from gnomon.ensemble.options import EnsembleOptions, Policy
from gnomon.ensemble.prompts import Prompt, conversation, understand
from gnomon.ensemble.runner import EnsembleRunner, Judged
from gnomon.ensemble.scoring import bits, byte_probabilities, fitting_weights, mixed
from gnomon.ensemble.told import Told
from gnomon.ensemble.trie import Floats
from gnomon.errors import ContextLengthExceeded, PromptError, UnsupportedModel, UsageError
from gnomon.ledger import enabled
from gnomon.loading import LEDGER, load
from gnomon.model import Model
from gnomon.patches.table import PatchTable
from gnomon.prompts import Messages

log = logging.getLogger("gnomon.ensemble")


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
        limits = Limits(kv_memory, max_sequences, token_budget, max_context)
        try:
            self.models = [self._opened(member, profile, threads) for member in members]
            self._names = names_of(members, self.models)
            self.policy = policy_of(self.options, self._names, members)
            self._assembly = assemble(self.models, self._names, self.policy, self.options, limits)
            identified = identity(self.models, self._assembly, self.policy, self.options)
            worker = EngineWorker(
                self._assembly.runner,
                fingerprint=identified,
                max_sequences=max_sequences,
                token_budget=token_budget,
            )
        except BaseException:
            self._close_owned()
            raise
        self._fingerprint = "fp_" + identified[:12]
        title, reference = name or "+".join(self._names), reference_of(members, self.options)
        super().__init__(
            EnsembleCheckpoint(title, reference, identified, self._assembly.tokenizer, self._names),
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
        return list(self._assembly.members)

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
        if self._assembly.shared:
            return super().render(messages, **variables)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        given = {key: value for key, value in variables.items() if value is not None}
        ids = conversation(self._assembly.symbols, messages, given)
        prompt, _ = understand(self._assembly.symbols.symbols, ids, None)
        for member in self._assembly.members:  # a template that refuses these messages is an error now
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
        for m, member in enumerate(self._assembly.members):
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

    def judge(self, prompt: str, texts: Sequence[str]) -> list[list[Judged]]:
        """What a gate would see at every token (of the primary) of some continuations of a prompt."""
        runner = self._assembly.runner
        if not isinstance(runner, EnsembleRunner):
            raise UsageError("A gate is for the cores union and topk.", param="ensemble.core")
        split = self._assembly.symbols.encode
        return self.worker.run_exclusive(lambda: runner.judge(split(prompt), [split(text) for text in texts]))

    def _scored(self, runner: ByteRunner, m: int, context: list[int], data: bytes) -> Floats:
        return byte_probabilities(self._assembly.members[m], runner.lattice(m), context, data)

    def _bytes(self) -> ByteRunner:
        runner = self._assembly.runner
        if not isinstance(runner, ByteRunner):
            raise UsageError("Next bytes are the byte core's.", hint="Open it with core='byte'.", param="ensemble.core")
        return runner

    def _prepare(self, request: Request, parsed: Mapping[str, Any]) -> None:
        asked: EnsembleOptions | None = parsed.get("ensemble")
        if len(self._names) == 1 and self._assembly.shared:
            return
        policy, merged = self.policy, self.options
        if asked is not None:
            merged = self.options.model_copy(update={key: getattr(asked, key) for key in asked.model_fields_set})
            policy = Policy.of(merged, self._names, self.policy.weights)
            if self._assembly.shared and policy.when != "every":
                raise UsageError(
                    f"`when: {policy.when}` cannot be set per request here: these members share one vocabulary and run "
                    "together.",
                    hint="Open the ensemble with core='union'.",
                    param="ensemble.when",
                )
        masked = bool(request.mask) or bool(request.bias)
        told = Told(self._names, policy, len(request.prompt_ids), None, request.cache_salt, masked, merged.trace)
        if not self._assembly.shared:
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
            return [m.prompt_bits(ids, 64) for m, ids in zip(self._assembly.members, prompts, strict=True)]

        return fitting_weights(self.worker.run_exclusive(measure), sharpness)

    def _prompts_of(self, request: Request) -> list[list[int]]:
        """The prompt in every member's tokens. Raises ContextLengthExceeded naming the member it is too long for."""
        prompt, _ = understand(self._assembly.symbols.symbols, request.prompt_ids, len(request.prompt_ids))
        found = []
        for member in self._assembly.members:
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
        return leader.template.source if self._assembly.shared and leader.can_chat else None

    def _opened(self, member: MemberLike, profile: str | None, threads: int | None) -> Model:
        if isinstance(member, Model):
            model = member
        else:
            model = open_member(member, profile, threads)
            self._owned.append(model)
        if model.network is None:
            what = "an ensemble itself" if isinstance(model, Ensemble) else "an embedding model"
            raise UnsupportedModel(f"`{model.name}` cannot be a member: it is {what}.")
        return model

    def _note_what_is_odd(self) -> None:
        prints = [model.fingerprint for model in self.models]
        if len(prints) == 1:
            log.warning("One member: the ensemble is `%s` itself, bit for bit.", self._names[0])
        elif len(set(prints)) == 1:
            log.warning("All members are the same model: the ensemble equals it up to the rounding of the mean.")
        if self.can_chat:
            for name, model in zip(self._names, self.models, strict=True):
                if not model.can_chat and not self._assembly.shared:
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
