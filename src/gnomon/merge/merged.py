"""MergedCheckpoint: a merge as a Checkpoint whose tensors are computed when they are asked for.

It can be served, scored, shown, merged again or written; its identity follows from the plan and its inputs'
identities without computing a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from gnomon.errors import MergeError
from gnomon.merge.blocks import Reader, TensorView
from gnomon.merge.compat import WIDENED
from gnomon.merge.compat.order import drawing_order, draws
from gnomon.merge.compat.replay import Replay
from gnomon.merge.data import Data, Texts
from gnomon.merge.planned import MergePlan, Source, TensorPlan
from gnomon.merge.randomness import CounterRandomness, Randomness, TorchRandomness
from gnomon.merge.registry import arithmetic_dtype, methods
from gnomon.models import identity
from gnomon.models.checkpoint import Checkpoint, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.merge.vocabulary import Vocabulary
    from gnomon.models.tokenizer import Tokenizer

Write = Callable[[int, "Tensor"], None]


class MergedCheckpoint(Checkpoint):
    """Models, a plan, and how to run it. vocabulary: the joined one, where the plan has one."""

    def __init__(
        self,
        plan: MergePlan,
        models: Mapping[str, Checkpoint],
        *,
        reference: str = "merge",
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
        vocabulary: Vocabulary | None = None,
        threads: int = 1,
        allow_nonfinite: bool = False,
        data: Texts | None = None,
    ) -> None:
        self.plan = plan
        self.models = models
        self.vocabulary = vocabulary
        self.donor = models[plan.donor]
        self.reference = reference
        self.name = reference
        self.path = None
        self.config = config if config is not None else self.donor.config
        self.generation_config = self.donor.generation_config
        self.chat_template = chat_template if chat_template is not None else self.donor.chat_template
        self.threads = threads
        self.data = data
        self._statistics: dict[str, Mapping[str, Tensor]] = {}
        self.allow_nonfinite = allow_nonfinite
        self._plans = {tensor.name: tensor for tensor in plan.tensors}
        self._random = _randomness(plan)
        self._replay = self._replayed(self._random.generator) if isinstance(self._random, TorchRandomness) else None
        self._lock = threading.Lock()
        self._once_lock = threading.Lock()
        self._kept: dict[str, Any] = {}

    def _replayed(self, generator: torch.Generator) -> Replay:
        """The tensors that draw from a generator, in mergekit's order."""
        drawing = [tensor for tensor in self.plan.tensors if draws(tensor)]
        order = drawing_order(self.plan.tensors, str(self.config.get("model_type"))) if drawing else []
        chosen = {tensor.name for tensor in drawing}
        return Replay([name for name in order if name in chosen], generator)

    def info(self, name: str) -> TensorInfo:
        planned = self._plans[name]
        return TensorInfo(name, planned.shape, planned.dtype)

    def __getitem__(self, name: str) -> Tensor:
        planned = self._plans[name]
        out = torch.empty(planned.shape, dtype=getattr(torch, planned.dtype))
        flat, lock = out.view(-1), threading.Lock()

        def write(start: int, rows: Tensor) -> None:
            with lock:
                flat[start : start + rows.numel()] = rows.reshape(-1)

        self.compute(name, write)
        return out

    def compute(self, name: str, write: Write, threads: int | None = None) -> None:
        """Compute one tensor block by block: write(start, values) from several threads, in the output's dtype."""
        planned = self._plans[name]
        dtype = getattr(torch, planned.dtype)
        if planned.method is None:
            self._copy(planned, write)
            return
        view = self.view(planned)
        view.threads = threads if threads is not None else self.threads
        view.out_dtype = dtype
        if methods()[planned.method].measure is not None and not self.plan.compat:
            view.hold()
        method = methods()[planned.method]
        if self._replay is None:
            method.run(view, planned.parameters, lambda start, rows: write(start, rows.to(dtype)))
            return
        with self._lock:
            self._replay.at(name, self._draw)
            # mergekit rounds to the inputs' type first, whatever is written
            kept = dtype if planned.method in WIDENED else view.stored
            view.out_dtype = kept
            method.run(view, planned.parameters, lambda start, rows: write(start, rows.to(kept).to(dtype)))
            self._replay.note(name)

    def _draw(self, name: str) -> None:
        """Merge a tensor for what it draws from the generator."""
        planned = self._plans[name]
        methods()[planned.method or ""].run(self.view(planned), planned.parameters, lambda start, rows: None)

    @property
    def order(self) -> list[str]:
        """Names in the order in which they are best computed."""
        first = self._replay.names if self._replay is not None else []
        return [*first, *(name for name in self if name not in set(first))]

    def view(self, planned: TensorPlan) -> TensorView:
        """One tensor's inputs as blocks."""
        kind = getattr(torch, planned.cast or planned.promoted)
        method = methods()[planned.method or "passthrough"]
        return TensorView(
            planned.name,
            planned.shape,
            [self._reader(planned, source) for source in planned.sources],
            self._reader(planned, planned.base) if planned.base is not None else None,
            arithmetic_dtype(kind),
            self._random,
            labels=[source.model for source in planned.inputs],
            allow_nonfinite=self.allow_nonfinite,
            stored=kind,
            cast=getattr(torch, planned.cast) if planned.cast else None,
            statistics=self._statistics_of(planned, method.statistics),
            texts=lambda: self._texts_of(planned),
            learned=self._learned_of(planned, method.learned),
            siblings=lambda: [self.view(other) for other in self.plan.tensors if other.method == planned.method],
            once=self._once,
        )

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        with self._once_lock:
            if key not in self._kept:
                self._kept[key] = make()
            return self._kept[key]

    def _statistics_of(self, planned: TensorPlan, kind: str | None) -> list[Tensor]:
        """What a method that looks at data needs of this tensor; empty where a model has nothing to say about it."""
        if kind is None or kind == "texts":
            return []
        from gnomon.merge.statistics import statistics

        found = []
        with self._lock:
            for source in planned.sources:
                if source.model not in self._statistics:
                    model, data = self.models[source.model], self._data_of(planned, source.model)
                    self._statistics[source.model] = statistics(kind, model, data.text, most_tokens=data.tokens)
                if source.tensor in self._statistics[source.model]:
                    found.append(self._statistics[source.model][source.tensor])
        return found if len(found) == len(planned.sources) else []

    def _data_of(self, planned: TensorPlan, model: str) -> Data:
        data = self.data.of(model) if self.data is not None else None
        if data is None:
            raise MergeError(
                f"`{planned.method}` looks at data.", hint="Set `data:` to a text file in the merge file.", param="data"
            )
        return data

    def _texts_of(self, planned: TensorPlan) -> tuple[list[Checkpoint], list[Data]]:
        """A tensor's models, and the text of each."""
        models = [source.model for source in planned.sources]
        return [self.models[model] for model in models], [self._data_of(planned, model) for model in models]

    def _learned_of(self, planned: TensorPlan, kind: str | None) -> list[float]:
        """The weights that a method finds on texts, for this tensor."""
        if kind is None:
            return []
        from gnomon.merge.learned import LEARNED

        order = [source.model for source in planned.sources]
        for model in order:
            self._data_of(planned, model)
        base = self.models[planned.base.model] if planned.base is not None else None
        texts = self.data.all() if self.data is not None else []
        models = [self.models[model] for model in order]
        found = self._once(f"{kind} {order}", lambda: LEARNED[kind](models, base, texts))
        return list(found[planned.sources[0].tensor])

    def _reader(self, planned: TensorPlan, source: Source) -> Reader:
        if planned.table and self.vocabulary is not None:
            return self.vocabulary.reader(source.model, source.tensor, self.models)
        return self.models[source.model].reader(source.tensor)

    def _copy(self, planned: TensorPlan, write: Write) -> None:
        """A tensor of whole numbers: must be the same everywhere."""
        values = [self.models[source.model][source.tensor] for source in planned.inputs]
        for source, value in zip(planned.inputs, values, strict=True):
            if not torch.equal(value, values[0]):
                raise MergeError(
                    f"`{planned.name}` is no floating-point tensor and differs between {planned.inputs[0].model} and "
                    f"{source.model}; it cannot be merged."
                )
        write(0, values[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def identity(self) -> str:
        inputs = {reference: checkpoint.identity for reference, checkpoint in self.models.items()}
        vocabulary = self.vocabulary.digest if self.vocabulary is not None else None
        parameters: dict[str, Any] = {"plan": self.plan.digest(inputs), "vocabulary": vocabulary}
        if self.data is not None:
            parameters["data"] = self.data.digest(inputs)
        return identity.derived("merge", parameters, sorted(inputs.values()))

    def tokenizer(self) -> Tokenizer:
        return self.vocabulary.tokenizer() if self.vocabulary is not None else self.donor.tokenizer()

    def close(self) -> None:
        for checkpoint in self.models.values():
            checkpoint.close()


def _randomness(plan: MergePlan) -> Randomness:
    return TorchRandomness(plan.seed) if plan.compat else CounterRandomness(plan.seed)
