"""The order in which mergekit 0.1.5 merges tensors: under `compat` it is the order in which random numbers are drawn.

mergekit walks a graph of tasks (save <- merge <- gather <- load), always taking the ready task with the least label
(the greatest name among a merge's input tensors), then the most urgent kind, then the one that its search of the graph
met first. Without slices that is the order of names. Layers that stand in the output twice read the same tensors, so
there the search decides; it is replayed here with task numbers in a set, as mergekit has them. Knows names only.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gnomon.merge.compat.directions import QUANTILE_SAMPLE
from gnomon.merge.layout import Layout, is_before_layers
from gnomon.merge.planned import TensorPlan
from gnomon.merge.registry import methods

FORWARD = (
    "input_layernorm", "self_attn.q_proj", "self_attn.q_norm", "self_attn.k_proj", "self_attn.k_norm",
    "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm", "pre_feedforward_layernorm", "mlp.up_proj",
    "mlp.gate_proj", "mlp.down_proj", "post_feedforward_layernorm",
)  # fmt: skip
BY_NAME = ("cohere", "qwen2", "qwen3")
"""Families whose layers mergekit lists by name; the others' tensors stand in the order of the forward pass."""
LAST_BY_NAME = {"qwen3": "self_attn.o_proj", "cohere": "self_attn.o_proj"}
URGENCY = {"writer": 10_000, "load": -1000, "gather": -10, "merge": 0, "save": 1000, "end": 0}


@dataclass
class _Graph:
    """Tasks by number, numbered as they are first met, each before what it needs."""

    numbers: dict[tuple[object, ...], int] = field(default_factory=dict)
    needs: list[list[int]] = field(default_factory=list)
    ranks: list[tuple[str, int]] = field(default_factory=list)

    def task(self, kind: str, *facts: object, label: str = "") -> int:
        """Its number; a new one if it was not met before."""
        key = (kind, *facts)
        if key not in self.numbers:
            self.numbers[key] = len(self.needs)
            self.needs.append([])
            self.ranks.append((label, -URGENCY[kind]))
        return self.numbers[key]


def draws(tensor: TensorPlan) -> bool:
    """Whether mergekit draws random numbers for a tensor."""
    if tensor.method == "arcee_fusion":
        return math.prod(tensor.shape) > QUANTILE_SAMPLE
    return tensor.method is not None and methods()[tensor.method].random


def drawing_order(tensors: Sequence[TensorPlan], family: str) -> list[str]:
    """Names of the output's tensors as mergekit comes to them. family: the network's `model_type`."""
    graph, merges = _Graph(), dict[int, str]()
    for tensor in sorted(tensors, key=_listed(tensors, family)):
        merges[_add(graph, tensor)] = tensor.name
    saves = [number for (kind, *_), number in graph.numbers.items() if kind == "save"]
    end = graph.task("end")
    graph.needs[end] = [graph.numbers["writer",], *saves]  # fmt: skip
    return [merges[number] for number in _walk(graph, [*saves, end]) if number in merges]


def _add(graph: _Graph, tensor: TensorPlan) -> int:
    """One tensor's tasks. Returns the number of its merge."""
    inputs = list(tensor.sources)
    if tensor.base is not None:
        inputs.insert(tensor.base_place if tensor.base_place is not None else len(inputs), tensor.base)
    loads = list({source.model: source for source in inputs}.values())
    label = max(source.tensor for source in loads)
    save = graph.task("save", tensor.name, label=label)
    writer = graph.task("writer")
    merge = graph.task("merge", tensor.name, label=label)
    gather = graph.task("gather", tensor.name, label=label)
    graph.needs[save], graph.needs[merge] = [writer, merge], [gather]
    graph.needs[gather] = [graph.task("load", source, label=source.tensor) for source in loads]
    return merge


def _walk(graph: _Graph, targets: list[int]) -> list[int]:
    """All tasks in the order in which they run."""
    met: dict[int, None] = {}
    waiting = [0] * len(graph.needs)
    unlocks: list[list[int]] = [[] for _ in graph.needs]
    seen, open_ = set[int](), set(targets)
    while open_:
        task = open_.pop()  # of small whole numbers: the order follows from how the set was filled
        if task in seen:
            continue
        seen.add(task)
        for need in graph.needs[task]:
            open_.add(need)
            met.setdefault(need)
            met.setdefault(task)
            waiting[task] += 1
            unlocks[need].append(task)
    place = {task: number for number, task in enumerate(met)}
    ready = [(graph.ranks[task], place[task], task) for task in met if not waiting[task]]
    heapq.heapify(ready)
    order = []
    while ready:
        task = heapq.heappop(ready)[2]
        order.append(task)
        for further in unlocks[task]:
            waiting[further] -= 1
            if not waiting[further]:
                heapq.heappush(ready, (graph.ranks[further], place[further], further))
    return order


def _listed(tensors: Sequence[TensorPlan], family: str) -> Callable[[TensorPlan], tuple[int, int, int, str]]:
    """A sorting key: as mergekit lists a network's tensors."""
    layout = Layout.of([tensor.name for tensor in tensors])
    stack = layout.main_stack()

    def key(tensor: TensorPlan) -> tuple[int, int, int, str]:
        place = layout.places[tensor.name]
        if place.stack != stack:
            return (0 if is_before_layers(tensor.name) else 2), 0, int("lm_head" in tensor.name), tensor.name
        part = place.rest.rsplit(".", 1)[0]
        if family in BY_NAME:
            return 1, place.layer, int(part == LAST_BY_NAME.get(family)), place.rest
        return 1, place.layer, FORWARD.index(part) if part in FORWARD else len(FORWARD), place.rest

    return key
