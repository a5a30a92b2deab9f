"""From a configuration and its models to what will be computed: one entry per output tensor.

Needs names, shapes and types only (file headers), never weights. Knows the precedence of parameters: source, slice,
module, whole file, the method's default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch

from gnomon.errors import ConfigError, MergeError, UsageError
from gnomon.merge.compat import WIDENED
from gnomon.merge.config import Input as ModelEntry
from gnomon.merge.config import MergeOptions, Slice, SliceSource
from gnomon.merge.layout import (
    HEADS,
    Layout,
    is_before_layers,
    is_buffer,
    is_vocabulary_table,
    layer_position,
)
from gnomon.merge.planned import MergePlan, Source, TensorPlan
from gnomon.merge.registry import MergeMethod, find_method, methods, suggest
from gnomon.merge.settings import MISSING, Setting
from gnomon.models.checkpoint import Checkpoint

HALVES = ("float16", "bfloat16")
FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class _Level:
    """Where parameters are looked up, the nearest first, and the tensor name that filters see."""

    settings: tuple[Mapping[str, Any], ...]
    tensor: str
    t: float

    def find(self, name: str) -> Any:
        for parameters in self.settings:
            if name in parameters:
                value = Setting.parse(parameters[name], f"parameters.{name}").at(self.tensor, self.t)
                if value is not MISSING:
                    return value
        return MISSING


@dataclass
class Planner:
    """Plans one document. checkpoints: by the references of the document; only their headers are read."""

    options: MergeOptions
    checkpoints: Mapping[str, Checkpoint]
    where: str = "merge"
    truncate: bool = False
    vocabulary_size: int | None = None
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.method: MergeMethod = find_method(self.options.merge_method)
        self.layouts = {reference: Layout.of(checkpoint) for reference, checkpoint in self.checkpoints.items()}
        self._refuse_unknown_parameters()

    def plan(self, *, seed: int = 0, compat: bool = False) -> MergePlan:
        """Raises ConfigError, MergeError with tensor and model."""
        options, layers = self.options, None
        planned: list[TensorPlan] = []
        if options.modules is not None:
            for name, module in options.modules.items():
                globals_ = (module.parameters, options.parameters)
                if module.models is not None:
                    planned += self._whole(module.models, globals_, name)
                else:
                    planned += self._sliced(module.slices or [], globals_, name)
                    layers = _total_layers(module.slices or [])
        elif options.models is not None:
            planned += self._whole(options.models, (options.parameters,), None)
        else:
            planned += self._sliced(options.slices or [], (options.parameters,), None)
            layers = _total_layers(options.slices or [])
        if compat and options.out_dtype is None:
            planned = [replace(t, dtype="float32") if t.method in WIDENED and t.dtype in HALVES else t for t in planned]
        tensors = tuple(sorted(planned, key=lambda tensor: tensor.name))
        if not tensors:
            raise MergeError(f"{self.where}: there is nothing to merge.")
        return MergePlan(tensors, self.donor, layers, tuple(dict.fromkeys(self.warnings)), compat, seed)

    @property
    def donor(self) -> str:
        """The model whose config and tokenizer the output takes: the base, else the first in the document."""
        return self.options.base_model or self.options.references()[0]

    def _whole(
        self, models: list[ModelEntry], outer: tuple[Mapping[str, Any], ...], module: str | None
    ) -> Iterator[TensorPlan]:
        """All tensors of whole models."""
        base = self.options.base_model
        entries = [(entry.model, entry.parameters) for entry in models]
        first = base or entries[0][0]
        everyone = [reference for reference, _ in entries] + ([base] if base else [])
        for name in self._names(everyone, first, module):
            t = self.layouts[first].position(name) if name in self.checkpoints[first] else 0.0
            sources = [
                (Source(reference, self._present(reference, name, everyone)), (parameters, *outer))
                for reference, parameters in entries
                if reference != base or self.method.base == "ignored"
            ]
            base_source = Source(base, self._present(base, name, everyone)) if base else None
            yield self._tensor(name, sources, base_source, t, outer)

    def _names(self, references: Iterable[str], first: str, module: str | None) -> list[str]:
        """Names of the output: those of any model, but for buffers that only some files hold."""
        chosen = list(dict.fromkeys(references))
        union = dict.fromkeys(name for reference in [first, *chosen] for name in self.checkpoints[reference])
        names = [name for name in union if module is None or _in_module(name, module)]
        if not names:
            raise ConfigError(f"{self.where}: no tensor belongs to the module `{module}`.", param=f"modules.{module}")
        everywhere = [name for name in names if all(name in self.checkpoints[r] for r in chosen)]
        return [name for name in names if name in everywhere or not is_buffer(name)]

    def _present(self, reference: str, name: str, others: Iterable[str]) -> str:
        """The model's name for a tensor; the input table stands in for a tied head. Raises MergeError."""
        checkpoint = self.checkpoints[reference]
        if name in checkpoint:
            return name
        if (table := HEADS.get(name)) is not None and table in checkpoint:
            self.warnings.append(f"{reference} ties its head to its embeddings; its embeddings stand in for `{name}`.")
            return table
        owner = next(other for other in others if name in self.checkpoints[other])
        raise MergeError(
            f"{self.where}: {reference} has no tensor `{name}`, which {owner} has.",
            hint="Only models of one network merge; slices can take layers from models of different depth.",
        )

    def _sliced(
        self, slices: list[Slice], outer: tuple[Mapping[str, Any], ...], module: str | None
    ) -> Iterator[TensorPlan]:
        """Layers stacked from runs of layers; what comes before them from the first slice, after them from the last."""
        first = slices[0].sources[0].model
        stack = self.layouts[first].main_stack()
        if stack is None:
            raise ConfigError(f"{self.where}: {first} has no numbered layers to slice.", param="slices")
        start = 0
        for piece in slices:
            count = piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0]
            self._check_ranges(piece)
            for offset in range(count):
                yield from self._layer(piece, outer, offset, start + offset, layer_position(offset, count))
            start += count
        for piece, before in ((slices[0], True), (slices[-1], False)):
            leader = piece.sources[0].model
            names = [
                name
                for name, place in self.layouts[leader].places.items()
                if place.stack != self.layouts[leader].main_stack() and is_before_layers(name) == before
            ]
            for name in names:
                if module is None or _in_module(name, module):
                    yield self._slice_tensor(piece, outer, name, {s.model: name for s in piece.sources}, name, 0.0)

    def _check_ranges(self, piece: Slice) -> None:
        for source in piece.sources:
            layout = self.layouts[source.model]
            depth = layout.stacks.get(layout.main_stack() or "", 0)
            if source.layer_range[1] > depth:
                raise ConfigError(
                    f"{self.where}: layer_range {list(source.layer_range)} leads beyond the {depth} layers of "
                    f"{source.model}.",
                    param="layer_range",
                )

    def _layer(
        self, piece: Slice, outer: tuple[Mapping[str, Any], ...], offset: int, target: int, t: float
    ) -> Iterator[TensorPlan]:
        leader = piece.sources[0]
        layout, wanted = self.layouts[leader.model], leader.layer_range[0] + offset
        stack = layout.main_stack() or ""
        for _, place in layout.places.items():
            if place.stack != stack or place.layer != wanted or is_buffer(place.rest):
                continue
            names = {}
            for source in piece.sources:
                own = self.layouts[source.model].main_stack()
                names[source.model, source.layer_range] = f"{own}.{source.layer_range[0] + offset}.{place.rest}"
            output = f"{stack}.{target}.{place.rest}"
            yield self._slice_tensor(piece, outer, output, names, f"{stack}.{wanted}.{place.rest}", t)

    def _slice_tensor(
        self,
        piece: Slice,
        outer: tuple[Mapping[str, Any], ...],
        output: str,
        names: Mapping[Any, str],
        leading: str,
        t: float,
    ) -> TensorPlan:
        """names: by (model, layer_range), or by model for what stands outside of the layers."""
        base = piece.base_model or self.options.base_model
        everyone = [source.model for source in piece.sources]
        levels = (piece.parameters, *outer)

        def input_of(source: SliceSource) -> Source:
            name = names.get((source.model, source.layer_range)) or names[source.model]
            return Source(source.model, self._present(source.model, name, everyone))

        sources, base_source = [], None
        for source in piece.sources:
            if source.model == base and self.method.base != "ignored":
                base_source = input_of(source)
            else:
                sources.append((input_of(source), (source.parameters, *levels)))
        if base and base_source is None and self.method.base != "ignored":
            base_source = Source(base, self._present(base, leading, everyone))
        planned = self._tensor(output, sources, base_source, t, levels)
        return replace(planned, base_place=everyone.index(base)) if base in everyone else planned

    def _tensor(
        self,
        name: str,
        sources: list[tuple[Source, tuple[Mapping[str, Any], ...]]],
        base: Source | None,
        t: float,
        shared: tuple[Mapping[str, Any], ...],
    ) -> TensorPlan:
        """Resolve parameters and check shapes and types of one output tensor."""
        used = base if self.method.base != "ignored" else None
        inputs = [source for source, _ in sources] + ([used] if used else [])
        infos = [self.checkpoints[source.model].info(source.tensor) for source in inputs]
        dtypes = [_plain(info.dtype) for info in infos]
        if not all(dtype in FLOATS for dtype in dtypes):
            return TensorPlan(name, infos[0].shape, dtypes[0], None, tuple(inputs), None, {})
        shape, table, rows = self._shape(name, inputs, [info.shape for info in infos])
        promoted = str(reduce(torch.promote_types, [getattr(torch, d) for d in dtypes])).removeprefix("torch.")
        cast = self.options.dtype if self.options.dtype in FLOATS else None
        out = self.options.out_dtype if self.options.out_dtype in FLOATS else cast
        return TensorPlan(
            name=name,
            shape=shape,
            dtype=out or promoted,
            method=self.method.name,
            sources=tuple(source for source, _ in sources),
            base=used,
            parameters=self._parameters(name, sources, t, shared, used is not None),
            promoted=promoted,
            cast=cast,
            table=table,
            rows=rows,
        )

    def _parameters(
        self,
        name: str,
        sources: list[tuple[Source, tuple[Mapping[str, Any], ...]]],
        t: float,
        shared: tuple[Mapping[str, Any], ...],
        has_base: bool,
    ) -> dict[str, Any]:
        where = f"{self.where}, tensor `{name}`"
        self.method.check_inputs(len(sources), has_base, self.where if self.options.models is not None else where)
        given: dict[str, Any] = {}
        for parameter in self.method.parameters.values():
            if not parameter.per_model:
                value = _Level(shared, name, t).find(parameter.name)
                if value is not MISSING:
                    given[parameter.name] = value
                continue
            values = [_Level(levels, source.tensor, t).find(parameter.name) for source, levels in sources]
            if any(value is MISSING for value in values):
                missing = next(s.model for (s, _), value in zip(sources, values, strict=True) if value is MISSING)
                if all(value is MISSING for value in values) and not parameter.required:
                    continue
                if parameter.required:
                    raise ConfigError(
                        f"{where}: `{self.method.name}` needs `{parameter.name}` for {missing}.",
                        hint=f"Add parameters: {{{parameter.name}: ...}} to that model.",
                        param=parameter.name,
                    )
            given[parameter.name] = [parameter.default if value is MISSING else value for value in values]
        try:
            return self.method.resolve(given, len(sources), where)
        except UsageError as error:
            raise self._of_one(given, [source.model for source, _ in sources], where) or error from None

    def _of_one(self, given: Mapping[str, Any], models: list[str], where: str) -> UsageError | None:
        """The error with the model whose own value is at fault; None where all of them are."""
        found = []
        for place, model in enumerate(models):
            own = {name: [value[place]] if isinstance(value, list) else value for name, value in given.items()}
            try:
                self.method.resolve(own, 1, f"{where} of {model}")
            except UsageError as error:
                found.append(error)
        return found[0] if 0 < len(found) < len(models) else None

    def _shape(
        self, name: str, inputs: list[Source], shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[int, ...], bool, int | None]:
        """(output shape, whether it is a table of tokens, rows kept)."""
        tables = [
            is_vocabulary_table(source.tensor, shape, self.checkpoints[source.model].config.get("vocab_size"))
            for source, shape in zip(inputs, shapes, strict=True)
        ]
        if all(tables) and self.vocabulary_size is not None and len({shape[1:] for shape in shapes}) == 1:
            return (self.vocabulary_size, *shapes[0][1:]), True, None
        if len(set(shapes)) == 1:
            return shapes[0], False, None
        shown = ", ".join(f"{source.model} {list(shape)}" for source, shape in zip(inputs, shapes, strict=True))
        if all(tables) and len({shape[1:] for shape in shapes}) == 1:
            if self.truncate:
                rows = min(shape[0] for shape in shapes)
                self.warnings.append(f"`{name}` is truncated to {rows} rows ({shown}).")
                return (rows, *shapes[0][1:]), False, rows
            raise MergeError(
                f"{self.where}: the vocabularies differ in `{name}`: {shown}.",
                hint="Add `tokenizer_source: union` (or base), or allow --unsafe-truncate-embeddings.",
            )
        raise MergeError(
            f"{self.where}: the shapes of `{name}` differ: {shown}.", hint="Only models of one network merge."
        )

    def _refuse_unknown_parameters(self) -> None:
        """A parameter that no method knows is an error; one that this method does not use is told."""
        known = {name for method in methods().values() for name in method.parameters}
        unused = set()
        for place, parameters in _all_parameters(self.options):
            for name in parameters:
                if name not in known:
                    raise ConfigError(
                        f"{self.where}: unknown parameter `{name}` in {place}.",
                        hint=suggest(name, self.method.parameters or known),
                        param=f"{place}.{name}",
                    )
                if name not in self.method.parameters:
                    unused.add(name)
        for name in sorted(unused):
            self.warnings.append(f"`{name}` has no effect with merge_method `{self.method.name}`.")


def _all_parameters(options: MergeOptions) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "parameters", options.parameters
    parts = [("", options.models, options.slices)]
    for name, module in (options.modules or {}).items():
        yield f"modules.{name}.parameters", module.parameters
        parts.append((f"modules.{name}.", module.models, module.slices))
    for prefix, models, slices in parts:
        for i, entry in enumerate(models or []):
            yield f"{prefix}models[{i}].parameters", entry.parameters
        for i, piece in enumerate(slices or []):
            yield f"{prefix}slices[{i}].parameters", piece.parameters
            for j, source in enumerate(piece.sources):
                yield f"{prefix}slices[{i}].sources[{j}].parameters", source.parameters


def _total_layers(slices: list[Slice]) -> int:
    return sum(piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0] for piece in slices)


def _in_module(name: str, module: str) -> bool:
    """`default` is everything; else the module's name is a component of the tensor's."""
    return module in ("default", "") or f".{module}." in f".{name}"


def _plain(dtype: str) -> str:
    """A GGUF block type reads as float32; torch's names are themselves."""
    return dtype if dtype.islower() else {"F16": "float16", "BF16": "bfloat16", "F64": "float64"}.get(dtype, "float32")
