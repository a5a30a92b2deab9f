"""`@merge_method`: one small file per method, one decorated function, whose signature is the schema of its parameters.

A method works block by block: `function(block, measured, **parameters)` gives the merged rows. What it must know of the
whole tensor first (a threshold, a norm) is found by `measure(view, **parameters)`, which may pass over all blocks.
Registering is all there is to adding a method: configuration, checks, planner and command read the schema here.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor

from gnomon.errors import MergeError, UsageError
from gnomon.merge.blocks import TensorView
from gnomon.merge.compat import side_by_side
from gnomon.merge.randomness import TorchRandomness

T = TypeVar("T")
_PER_MODEL = object()
PerModel = Annotated[Sequence[T], _PER_MODEL]
"""Annotation of a parameter that has one value per (non-base) model."""
REQUIRED = object()
BaseUse = Literal["required", "optional", "ignored"]
_METHODS: dict[str, MergeMethod] = {}


def each(default: Any) -> Any:
    """The default of a PerModel parameter: this value for every model."""
    return default


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method. kind: bool, int, float or str; default REQUIRED: the configuration must give it."""

    name: str
    kind: type
    default: Any
    per_model: bool
    optional: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def convert(self, value: Any, where: str) -> Any:
        """The value in the parameter's type; YAML's oddities (1e-5 read as a string) are taken as meant."""
        if value is None and self.optional:
            return None
        try:
            if self.kind is bool:
                if isinstance(value, str) and value.lower() in ("true", "false"):
                    return value.lower() == "true"
                if isinstance(value, bool | int):
                    return bool(value)
            elif self.kind in (int, float) and not isinstance(value, bool):
                number = self.kind(float(value))
                if math.isfinite(number):
                    return number
            elif self.kind is str and isinstance(value, str | bool):
                return value if isinstance(value, str) else str(value).lower()
        except (TypeError, ValueError):
            pass
        raise UsageError(f"{where}: `{self.name}` must be a {self.kind.__name__}, not {value!r}.", param=self.name)


@dataclass(frozen=True)
class MergeMethod:
    """A registered method. whole: it needs a tensor's inputs in memory at once. version: part of derived identities."""

    name: str
    function: Callable[..., Tensor]
    measure: Callable[..., Any] | None
    base: BaseUse
    sources: tuple[int, int | None]
    parameters: Mapping[str, Parameter]
    check: Callable[..., None] | None
    scratch: int
    whole: bool
    reference: str
    statistics: Literal["gram", "fisher", "texts"] | None = None
    learned: Literal["greedy_soup", "adamerging"] | None = None
    random: bool = False
    version: int = 1

    @property
    def help(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    def resolve(self, given: Mapping[str, Any], models: int, where: str = "merge") -> dict[str, Any]:
        """All parameters complete and converted: a list per PerModel one (scalars go to every model).

        Raises UnknownOption-like UsageError for an unknown name, a missing required one, or a list of another length.
        """
        for name in given:
            if name not in self.parameters:
                raise UsageError(
                    f"{where}: `{self.name}` has no parameter `{name}`.",
                    hint=suggest(name, self.parameters),
                    param=name,
                )
        values: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default)
            if value is REQUIRED:
                raise UsageError(f"{where}: `{self.name}` needs the parameter `{name}`.", param=name)
            if not parameter.per_model:
                values[name] = parameter.convert(value, where)
                continue
            listed = list(value) if isinstance(value, list | tuple) else [value] * models
            if len(listed) != models:
                raise UsageError(f"{where}: `{name}` has {len(listed)} values for {models} models.", param=name)
            if REQUIRED in listed:
                raise UsageError(f"{where}: `{self.name}` needs `{name}` for every model.", param=name)
            values[name] = [parameter.convert(item, where) for item in listed]
        if self.check is not None:
            try:
                self.check(**_accepted(self.check, values))
            except UsageError as error:
                raise UsageError(f"{where}: {error.message}", hint=error.hint, param=error.param) from None
        return values

    def check_inputs(self, models: int, has_base: bool, where: str = "merge") -> None:
        """Raises UsageError when the number of models or the base does not fit."""
        least, most = self.sources
        if self.base == "required" and not has_base:
            raise UsageError(
                f"{where}: `{self.name}` needs a base model.", hint="Set `base_model`.", param="base_model"
            )
        if models < least or (most is not None and models > most):
            wanted = f"exactly {least}" if least == most else f"at least {least}"
            beside = " beside the base" if self.base == "required" else ""
            raise UsageError(f"{where}: `{self.name}` merges {wanted} model(s){beside}, not {models}.", param="models")

    def run(self, view: TensorView, parameters: Mapping[str, Any], write: Callable[[int, Tensor], None]) -> None:
        """Merge one tensor: write(start, rows) is called once per block (from several threads).

        Under compat (torch's random numbers) mergekit's own steps are taken, over the whole tensor.
        """
        if isinstance(view.random, TorchRandomness) and (whole := side_by_side(self.name)) is not None:
            models, base = view.whole()
            used = _accepted(whole, parameters)
            write(0, whole(models, base, view.random.generator, **used))
            return
        measured = self.measure(view, **_accepted(self.measure, parameters)) if self.measure is not None else None
        spelled = _accepted(self.function, parameters)
        view.map(lambda block: write(block.start, self.function(block, measured, **spelled)))


def merge_method(
    name: str,
    *,
    base: BaseUse = "required",
    sources: tuple[int, int | None] = (1, None),
    measure: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    scratch: int = 6,
    whole: bool = False,
    reference: str = "",
    statistics: Literal["gram", "fisher", "texts"] | None = None,
    learned: Literal["greedy_soup", "adamerging"] | None = None,
    random: bool = False,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a method. scratch: temporaries per model, for the planner. statistics: what it needs of data.

    learned: how its weights are found on texts (learned.py). random: its result depends on the seed.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _METHODS[name] = MergeMethod(
            name=name,
            function=function,
            measure=measure,
            base=base,
            sources=sources,
            parameters=_schema(function),
            check=check,
            scratch=scratch,
            whole=whole,
            reference=reference,
            statistics=statistics,
            learned=learned,
            random=random,
        )
        return function

    return register


def _schema(function: Callable[..., Any]) -> dict[str, Parameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    schema = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint, per_model, optional = hints[name], False, False
        if typing.get_origin(hint) is Annotated:
            per_model = _PER_MODEL in typing.get_args(hint)[1:]
            hint = typing.get_args(typing.get_args(hint)[0])[0]
        if type(None) in typing.get_args(hint):
            hint, optional = next(kind for kind in typing.get_args(hint) if kind is not type(None)), True
        default = REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
        schema[name.rstrip("_")] = Parameter(name.rstrip("_"), hint, default, per_model, optional)
    return schema


@cache
def _spelled(function: Callable[..., Any]) -> dict[str, str]:
    """Parameter name in a configuration -> the function's own spelling (`lambda` is a Python keyword)."""
    return {name.rstrip("_"): name for name in inspect.signature(function).parameters}


def _accepted(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    spelled = _spelled(function)
    return {spelled[name]: value for name, value in values.items() if name in spelled}


@cache
def methods() -> dict[str, MergeMethod]:
    """All methods by name: this package's, and those of the entry point `gnomon.merge_methods`."""
    from importlib.metadata import entry_points

    import gnomon.merge.methods as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for point in entry_points(group="gnomon.merge_methods"):
        point.load()
    return dict(sorted(_METHODS.items()))


def find_method(name: str) -> MergeMethod:
    """Raises MergeError with the nearest name."""
    known = methods()
    if name not in known:
        raise MergeError(f"Unknown merge method `{name}`.", hint=suggest(name, known), param="merge_method")
    return known[name]


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """A hint for an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"Did you mean `{close[0]}`?" if close else f"Known: {', '.join(names)}."


def arithmetic_dtype(stored: torch.dtype) -> torch.dtype:
    """What the arithmetic of blocks is done in: float32, float64 for float64."""
    return torch.float64 if stored is torch.float64 else torch.float32
