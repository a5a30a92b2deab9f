"""The facade: text in, text out, over checkpoint + network + engine + stages.

`gnomon.load(ref)` gives a Model; its methods are sync, async and streaming views of one submission path, so that the
command line, the server, recipes and programs all get the same tokens. Knows nothing of HTTP or terminals.
"""

from __future__ import annotations

import copy
import secrets
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from gnomon.arch.network import Network
from gnomon.capability import Origin
from gnomon.engine.certificate import Certificate, certified
from gnomon.engine.request import Request, SamplingParams
from gnomon.engine.worker import EngineStats, EngineWorker
from gnomon.errors import (
    ChatTemplateError,
    PromptError,
    UnsupportedModel,
    UsageError,
)
from gnomon.generation import Chunk, Generation, Run, Score
from gnomon.kernels.profile import NumericProfile
from gnomon.kernels.side import SidePath
from gnomon.models.chat import ChatTemplate
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.identity import tensor_digest
from gnomon.models.patch import Patch
from gnomon.models.tokenizer import Tokenizer
from gnomon.patches.table import Laid, PatchTable
from gnomon.prompts import (
    Admitted,
    Messages,
    Prompt,
    checked_ids,
    checked_message,
    encoded,
    is_chat,
    messages_of,
    prompts_of,
)
from gnomon.registry import ParsedOptions, Registry
from gnomon.sampling.params import sampling_params
from gnomon.session import describe_token
from gnomon.stages import StageContext
from gnomon.submission import Recorder, Submission, make_request, noted_run

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.arch.encoder import Encoder
    from gnomon.kernels.side import SidePath
    from gnomon.sampling.options import SamplingOptions


class Model:
    """One loaded model. Thread-safe; a context manager; close() frees its memory, and so does dropping the model.

    Options of generate, chat and stream are the registry's: temperature, top_p, seed, stop, logit_bias, ... and one
    key per installed capability.
    """

    reporting: Mapping[str, Any] = {"logprobs": 5}
    """Options that make it tell all it can of each token, and change none."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        network: Network | None = None,
        worker: EngineWorker | None = None,
        encoder: Encoder | None = None,
        profile: NumericProfile | None = None,
        defaults: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        open_model: Callable[[str], Any] | None = None,
        observer: Callable[[Run], None] | None = None,
    ) -> None:
        self.observer = observer
        self.checkpoint = checkpoint
        self.name = checkpoint.name
        self.network = network
        self.encoder = encoder
        self._profile = profile
        self._patches = PatchTable(checkpoint, network) if network is not None else None
        self._beside: tuple[Laid, ...] = ()
        self._parent: Model | None = None
        self.registry = Registry.installed()
        self.defaults = dict(defaults or {})
        self._worker = worker
        if worker is not None:  # its thread would live on, and keep the weights, when nobody can reach the model
            weakref.finalize(self, worker.close, timeout=0).atexit = False
        self._open_model = open_model or _refuse_to_open
        self._template_source = chat_template if chat_template is not None else checkpoint.chat_template
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        self._lock = threading.Lock()
        self._closed = False
        self.registry.prepare(self.defaults)
        if (given := self.defaults.get("patches")) and self._patches is not None:
            self.defaults["patches"] = self._patches.preload([given] if isinstance(given, str) else given)

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self.checkpoint.tokenizer()
            return self._tokenizer

    @property
    def profile(self) -> NumericProfile | None:
        """The numeric profile, this model's own patches included; None for an embedding model."""
        profile = self._parent.profile if self._parent is not None else self._profile
        return profile and profile.with_patches([laid.identity for laid in self._beside])

    @property
    def fingerprint(self) -> str:
        """Names everything that can change a bit of the output: `system_fingerprint` in responses."""
        return self.profile.fingerprint if self.profile else "fp_" + self.checkpoint.identity[:12]

    def fingerprint_of(self, options: Mapping[str, Any]) -> str:
        """The fingerprint that a generation with these options has: patches asked for are part of it.

        Raises PatchNotFound, and what `generate` raises for wrong options.
        """
        parsed = self.registry.parse(options, Origin.PYTHON, self.defaults)
        context = StageContext(self.tokenizer, self.name, 0, self._open_model, host=self)
        return self._fingerprint_with(self._chosen_patches(parsed, context, Origin.PYTHON))

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.worker.max_context

    @property
    def worker(self) -> EngineWorker:
        if self._closed:
            raise UsageError(f"The model `{self.name}` was closed.")
        if self._worker is None:
            raise UnsupportedModel(
                f"`{self.name}` is an embedding model: it cannot generate text.", hint="Use embed()."
            )
        return self._worker

    @property
    def template(self) -> ChatTemplate:
        """The chat template. Raises ChatTemplateError when the model has none."""
        if self._template_source is None:
            raise ChatTemplateError(
                f"`{self.name}` has no chat template.",
                hint="Give one (`--chat-template FILE`, `chat_template:` in the recipe, "
                "gnomon.load(..., chat_template=...)), or use a raw prompt: `gnomon generate`, /v1/completions.",
            )
        if self._template is None:
            tokenizer = self.tokenizer
            bos = tokenizer.bos_token_id
            eos = min(tokenizer.eos_token_ids, default=None)
            self._template = ChatTemplate(
                self._template_source,
                bos_token=tokenizer.token_text(bos) if bos is not None else "",
                eos_token=tokenizer.token_text(eos) if eos is not None else "",
            )
        return self._template

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template_source is not None

    def stats(self) -> EngineStats:
        return self.worker.stats()

    def certificate(self, *, renew: bool = False) -> Certificate:
        """This model and profile, self-tested on this machine: see docs/determinism.md. Kept between runs."""
        network, profile = self.network, self.profile
        worker = self.worker
        if network is None or profile is None:
            raise UnsupportedModel(f"`{self.name}` is an embedding model: there is no certificate for it.")
        fingerprint, described = profile.fingerprint, profile.as_dict()
        sides = self.sides
        return worker.run_exclusive(lambda: certified(network, fingerprint, described, renew=renew, sides=sides))

    # -- patches ------------------------------------------------------------------------------------------------

    @property
    def patches(self) -> PatchTable:
        """The patches that requests may name: `add(name, patch or file)`, `remove(name)`, while requests run or not."""
        if self._patches is None:
            raise UnsupportedModel(f"`{self.name}` has no generating network: patches cannot run beside it.")
        return self._patches

    def with_patches(self, patches: Sequence[Patch | str | Path]) -> Model:
        """This model with patches (values, files, PEFT LoRA directories) beside its weights, in order.

        The weights, the engine and the batches are shared: both models may run at once. Closing the result frees
        only what is its own. Raises WrongBase for a patch of another model, PatchError for one that is not low-rank.
        """
        table = self.patches
        beside = list(self._beside)
        for patch in patches:
            known = isinstance(patch, str) and patch in table
            beside.append(table.find(str(patch), trusted=True) if known else table.lay(patch, below=beside))
        twin = copy.copy(self)
        twin._beside = tuple(beside)
        twin._parent = self._parent or self
        twin._lock = threading.Lock()
        return twin

    @property
    def sides(self) -> tuple[SidePath, ...]:
        """The patches that run beside this model's weights, as the engine's spans take them."""
        return tuple(laid.side for laid in self._beside)

    @property
    def worn(self) -> tuple[Patch, ...]:
        """The patches beside this model's weights, in order."""
        return tuple(laid.patch for laid in self._beside)

    @property
    def unpatched(self) -> Model:
        """The model under `with_patches`; itself when there is nothing to take off."""
        return self._parent or self

    def _chosen_patches(self, parsed: ParsedOptions, context: StageContext, origin: Origin) -> list[Laid]:
        """The patches that the options of one request ask for, in the registry's order."""
        chosen: list[Laid] = []
        for entry in self.registry.patches(parsed, context):
            chosen.append(self.patches.find(entry, trusted=origin is not Origin.REQUEST))
        return chosen

    def _fingerprint_with(self, chosen: Sequence[Laid]) -> str:
        profile = self.profile and self.profile.with_patches([laid.identity for laid in chosen])
        return profile.fingerprint if profile else self.fingerprint

    # -- text ---------------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> Generation: ...
    @overload
    def generate(self, prompt: Sequence[Prompt], **options: Any) -> list[Generation]: ...
    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Generation | list[Generation]:
        """Continue a prompt (text or token ids), or several at once in one batch.

        Returns one Generation, or a list when several prompts were given or n > 1 (n per prompt, in order).
        """
        prompts, several = prompts_of(prompt)
        handles = [self.submit(one, options) for one in prompts]
        results = [generation for handle in handles for generation in handle.collect()]
        return results if several or len(results) > 1 else results[0]

    def chat(self, messages: str | Messages, **options: Any) -> Generation | list[Generation]:
        """Answer a conversation through the model's chat template. A string is one user message."""
        results = self.submit(messages_of(messages), options, chat=True).collect()
        return results if len(results) > 1 else results[0]

    def stream(self, prompt: Prompt | Messages, **options: Any) -> Iterator[Chunk]:
        """Like generate (str or ids) or chat (messages), chunk by chunk. Closing the iterator cancels the request."""
        return iter(self.submit(prompt, options, chat=is_chat(prompt)))

    async def agenerate(self, prompt: Prompt, **options: Any) -> Generation | list[Generation]:
        """generate(), awaitable. Cancelling the task cancels the request."""
        return await self.submit(prompt, options).acollect()

    async def achat(self, messages: str | Messages, **options: Any) -> Generation | list[Generation]:
        """chat(), awaitable."""
        return await self.submit(messages_of(messages), options, chat=True).acollect()

    def astream(self, prompt: Prompt | Messages, **options: Any) -> AsyncIterator[Chunk]:
        """stream(), asynchronous."""
        return self.submit(prompt, options, chat=is_chat(prompt)).chunks()

    def render(self, messages: str | Messages, **variables: Any) -> list[int]:
        """A conversation as token ids through the chat template; special-token text in contents stays plain text."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.template.render_ids(self.tokenizer, [dict(message) for message in messages], **variables)

    def encode(self, prompt: Prompt) -> list[int]:
        """A raw prompt as token ids, with the model's BOS; ids pass unchanged."""
        return encoded(self.tokenizer, prompt)

    def admit(
        self,
        prompt: Prompt | Messages,
        options: Mapping[str, Any],
        *,
        origin: Origin = Origin.PYTHON,
        variables: Mapping[str, Any] | None = None,
    ) -> Admitted:
        """Parse the options once, let the prompt stages (the guard's input checks) see each text, make token ids.

        variables: for the chat template. Raises Blocked when a stage refuses the prompt.
        """
        parsed = self.registry.parse(options, origin, self.defaults)
        sampling: SamplingOptions = parsed["sampling"]  # type: ignore[assignment]
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(32)
        context = StageContext(self.tokenizer, self.name, seed, self._open_model, host=self)
        patches = tuple(self._chosen_patches(parsed, context, origin))
        stages = self.registry.prompt_stages(parsed, context)
        if is_chat(prompt):
            checked = [checked_message(message, stages) for message in prompt]
            ids = self.render(checked, **(variables or {}))
        else:
            given = checked_ids(self.tokenizer, prompt, stages)  # type: ignore[arg-type]
            ids = self.registry.prompt_ids(parsed, given, context)
            context.memory["prompt_ids"] = given
        return Admitted(ids, parsed, options, context, patches)

    def submit(
        self,
        prompt: Prompt | Messages | Admitted,
        options: Mapping[str, Any],
        *,
        chat: bool = False,
        origin: Origin = Origin.PYTHON,
        id_prefix: str = "gen",
        observer: Callable[[Run], None] | None = None,
    ) -> Submission:
        """The one path every generation takes. Parses the options once, builds the stages, hands n requests over.

        observer: told of each finished choice in place of the model's own (the ledger).
        """
        worker = self.worker
        admitted = prompt if isinstance(prompt, Admitted) else self.admit(prompt, options, origin=origin)
        parsed, ids, context = admitted.parsed, admitted.ids, admitted.context
        sampling: SamplingOptions = parsed["sampling"]  # type: ignore[assignment]
        seed = context.seed
        params = sampling_params(
            sampling,
            seed=seed,
            prompt_tokens=len(ids),
            max_context=self.max_context,
            eos_token_ids=self.tokenizer.eos_token_ids,
            chat=chat,
        )
        fingerprint, beside = self._fingerprint_with(admitted.patches), (*self._beside, *admitted.patches)
        submission = Submission(self, worker, f"{id_prefix}-{secrets.token_hex(12)}", seed, len(ids), fingerprint)
        filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        context = replace(context, max_tokens=params.max_tokens, temperature=params.temperature, filtered=filtered)
        report = observer or self.observer
        noted = self._noted(submission, admitted, params, beside) if report else None
        requests = [
            make_request(
                submission,
                index,
                ids,
                params,
                self.registry.stages(parsed, context),
                self.tokenizer,
                want_logprobs=sampling.logprobs is not None,
                echo=self.tokenizer.decode(ids) if sampling.echo else "",
                healed=context.memory.get("healed", b"").decode(),
                recorder=Recorder(replace(noted, choice=index), report) if noted and report else None,
                sides={laid.identity: laid.side for laid in beside},
            )
            for index in range(sampling.n)
        ]
        for request in requests:
            self._prepare(request, parsed)
        submission.requests = [request.id for request in requests]
        for request in requests:
            worker.submit(request)
        return submission

    def _noted(self, submission: Submission, admitted: Admitted, params: SamplingParams, beside: Sequence[Laid]) -> Run:
        """This prompt's run, as the ledger will have it: its patches by identity, a private prompt left out."""
        given = {**self.defaults, **admitted.options}
        if beside:
            given = {key: value for key, value in given.items() if key not in self.registry.weights_keys()}
            given["patches"] = [laid.identity for laid in beside]  # a name may mean another patch tomorrow
        noted = noted_run(
            submission,
            admitted.context.memory.get("prompt_ids", admitted.ids),
            given,
            model=self.name,
            reference=self.checkpoint.reference,
            profile=self.profile.dtype if self.profile else "",
            max_tokens=params.max_tokens,
        )
        private = admitted.context.memory.get("private_prompt")
        return replace(noted, prompt_ids=[], replayable=False) if private else noted

    def _prepare(self, request: Request, parsed: Mapping[str, Any]) -> None:
        """The last word on a request before the engine gets it; a subclass tells its own runner more."""
        for name in parsed:
            if self.registry.capabilities[name].runner is not None:
                raise UsageError(
                    f"`{name}` is set, but `{self.name}` is a single model.",
                    hint=f"Open one that has it: gnomon {name} --help",
                    param=name,
                )

    # -- numbers ------------------------------------------------------------------------------------------------

    def logits(self, prompt: Prompt) -> Tensor:
        """Next-token logits after every prompt token -> [T, V] float32."""
        return self.worker.logits(self.encode(prompt), self.sides)

    def score(self, prompt: Prompt, continuation: str) -> Score:
        """How likely the continuation is after the prompt, token by token (teacher-forced)."""
        import torch

        ids = self.encode(prompt)
        target = self.tokenizer.encode(continuation, add_special_tokens=False)
        if not target:
            raise PromptError("The continuation is empty.", param="continuation")
        rows = self.worker.logits(ids + target, self.sides)[len(ids) - 1 : -1]
        logprobs = torch.log_softmax(rows, dim=-1).gather(1, torch.tensor(target)[:, None])[:, 0].tolist()
        tokens = [describe_token(self.tokenizer, t, value) for t, value in zip(target, logprobs, strict=True)]
        return Score(sum(logprobs), tokens)

    def embed(self, texts: str | Sequence[str]) -> Tensor:
        """Sentence embeddings, L2-normalised -> [n, C] (a single text: [C]).

        An embedding model pools as it was trained to; a decoder gives the mean of its final hidden states.
        """
        import torch

        many = [texts] if isinstance(texts, str) else list(texts)
        if not many or any(not text for text in many):
            raise PromptError("A text to embed is empty.", param="input")
        if self.encoder is not None:
            vectors = self.encoder.embed(many)
        else:
            pooled = [self.worker.hidden(self.encode(text), self.sides).mean(dim=0) for text in many]
            vectors = torch.nn.functional.normalize(torch.stack(pooled), dim=-1)
        return vectors[0] if isinstance(texts, str) else vectors

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens that `embed` would use for each text."""
        if self.encoder is not None:
            return self.encoder.token_counts(list(texts))
        return [len(self.encode(text)) for text in texts]

    # -- weights ------------------------------------------------------------------------------------------------

    @contextmanager
    def module(self) -> Iterator[Any]:
        """The transformers module over the same tensors (no second copy), for gradients, hooks and interventions.

        On exit the engine sees what changed: tensors are rehashed, the fingerprint renewed, the prefix cache flushed.
        While the context is open no generation step runs. Raises UsageError for profiles whose weights are packed.
        """
        from gnomon.arch.module import hf_module

        if self.network is None:
            raise UnsupportedModel(f"`{self.name}` has no generating network.")
        if self._beside:
            raise UsageError(
                "The patches of this model run beside its weights: its module would not have them.",
                hint="Take the module of the unpatched model, or load the patched weights (Patch.apply).",
            )
        network = self.network
        with self.worker.paused():
            module = hf_module(network, self.checkpoint)
            before = {name: tensor_digest(tensor) for name, tensor in network.tensors().items()}
            try:
                yield module
            finally:
                network.refresh()
                changed = {
                    name: digest
                    for name, tensor in network.tensors().items()
                    if (digest := tensor_digest(tensor)) != before[name]
                }
                if changed:
                    self.weights_changed(changed)

    def weights_changed(self, changed: Mapping[str, str]) -> None:
        """Tensors were changed in place while the engine was paused (name -> sha256): renew the fingerprint, flush."""
        if self._profile is not None:
            self._profile = self._profile.with_changed_weights(changed)
            self.worker.weights_changed(self._profile.fingerprint)

    # -- life ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel what runs, stop the engine's thread, free the memory. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._parent is not None:
            self._beside = ()
            return  # the engine and the files are the unpatched model's
        if self._worker is not None:
            self._worker.close()
        self._worker = self.network = self.encoder = None
        self.checkpoint.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Model {self.name} {self.profile.dtype if self.profile else 'encoder'} {self.fingerprint}>"


def _refuse_to_open(reference: str) -> Any:
    raise UsageError(f"This model was made without a way to open another (`{reference}`).", hint="Use gnomon.load().")
