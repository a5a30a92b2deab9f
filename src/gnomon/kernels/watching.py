"""Which operators a module reaches, and which of them keep a row's bits the same in any company.

Watched below autograd with TorchDispatchMode: canonical operators, data movement, arithmetic element by element, exact
reductions (greatest, any, integer sums) are covered. Everything else is named with the module that called it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gnomon.errors import UnsupportedModel


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVEMENT = _words("""
    view _unsafe_view reshape expand permute transpose t slice select narrow squeeze unsqueeze cat stack split unbind
    split_with_sizes chunk clone copy copy_ _to_copy contiguous detach alias lift_fresh lift_fresh_copy index index_put
    index_select gather embedding repeat repeat_interleave roll flip arange full full_like zeros zeros_like ones
    new_zeros new_ones new_full empty empty_like empty_strided new_empty new_empty_strided scalar_tensor fill fill_
    zero_ ones_like where masked_fill masked_fill_ triu tril diagonal constant_pad_nd as_strided unfold item
    is_nonzero slice_scatter _local_scalar_dense select_scatter view_as_real view_as_complex _reshape_alias resolve_conj
""")
ELEMENTWISE = _words("""
    add add_ sub sub_ rsub mul mul_ div div_ neg abs sqrt rsqrt reciprocal pow exp log tanh sin cos floor ceil round
    sign maximum minimum clamp clamp_ clamp_min clamp_max relu relu_ eq ne lt le gt ge logical_and logical_or
    logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor floor_divide remainder fmod isnan isinf
    isfinite bitwise_and_ bitwise_or_ __and__ __or__ trunc sgn
""")
EXACT = _words("amax amin max min argmax argmin any all sort topk nonzero equal")
OF_INTEGERS = _words("sum cumsum prod bincount")
HINTS = {
    "bmm": "load the model with attn_implementation='sdpa'",
    "baddbmm": "load the model with attn_implementation='sdpa'",
    "native_dropout": "put it in eval mode",
    "bernoulli_": "put it in eval mode",
}


@dataclass(frozen=True)
class Coverage:
    """covered: operator -> calls. uncovered: (operator, module's name) -> calls."""

    module: str
    covered: dict[str, int]
    uncovered: dict[tuple[str, str], int]

    @property
    def complete(self) -> bool:
        return not self.uncovered

    def sentence(self) -> str:
        """The uncovered operators, each with its first modules."""
        places: dict[str, list[str]] = {}
        for operator, where in self.uncovered:
            places.setdefault(operator, []).append(where or "(itself)")
        return "; ".join(
            f"{operator} in {', '.join(found[:2])}" + (f" and {len(found) - 2} more" if len(found) > 2 else "")
            for operator, found in sorted(places.items())
        )


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what the modules of one tree reach while it is entered."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = type(module).__name__
        self.names = {id(part): name for name, part in module.named_modules()}
        self.stack: list[str] = []
        self.covered: Counter[str] = Counter()
        self.uncovered: Counter[tuple[str, str]] = Counter()

    def enter(self, module: nn.Module) -> None:
        self.stack.append(self.names.get(id(module), type(module).__name__))

    def leave(self) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_covered(func, args):
            self.covered[str(func)] += 1
        else:
            self.uncovered[(str(func), self.stack[-1] if self.stack else "")] += 1
        return func(*args, **(kwargs or {}))

    def report(self) -> Coverage:
        return Coverage(self.kind, dict(self.covered), dict(self.uncovered))

    def raise_if_uncovered(self) -> None:
        report = self.report()
        if report.complete:
            return
        names = {str(operator).split(".")[1] for operator, _ in report.uncovered}
        hints = sorted({HINTS[name] for name in names if name in HINTS})
        raise UnsupportedModel(
            f"{report.module} reaches operators that are not canonical, so its bits may change with the batch: "
            f"{report.sentence()}.",
            hint=(f"Try: {'; '.join(hints)}. " if hints else "")
            + "canonical(check=False) runs it all the same, without the promise.",
        )


def is_covered(func: Any, args: Any) -> bool:
    """Whether an operator, on these arguments, gives a row the same bits in any company."""
    namespace, name = func.namespace, func._schema.name.split("::")[1]
    if namespace == "gnomon":
        return True
    if namespace not in ("aten", "prims"):
        return False
    if name == "index_put" and len(args) > 3 and args[3]:
        return False  # it adds where indices meet
    if name in MOVEMENT or name in ELEMENTWISE or name in EXACT:
        return True
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    whole = all(not tensor.is_floating_point() and not tensor.is_complex() for tensor in tensors)
    return whole and (name in OF_INTEGERS or not tensors)
