"""The k greatest scores of a tensor without sorting it: a sampled bracket, one counting pass, a sort of what is inside.

Exact whatever the sample was (a bracket that misses is widened), and exact about ties: elements equal to the threshold
are kept from the lowest index on, as a stable descending sort would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon.kernels import merging
from gnomon.merge.blocks import Block, ChainedView, TensorView

SAMPLE = 1 << 12
Bracket = tuple[float, float]


@dataclass(frozen=True)
class Cut:
    """Which elements are among the greatest: above `threshold`, and equal to it up to flat index `last`."""

    threshold: float
    last: int

    def mask(self, scores_RC: Tensor, start: int) -> Tensor:
        """True for the elements kept; start: flat index of the block's first element."""
        if self.last >= start + scores_RC.numel() - 1:
            return scores_RC >= self.threshold
        above_RC = scores_RC > self.threshold
        if self.last < start:
            return above_RC
        first = self.last + 1 - start
        above_RC.view(-1)[:first] |= scores_RC.reshape(-1)[:first] == self.threshold
        return above_RC

    def shifted(self, by: int) -> Cut:
        """The cut for a part that begins at flat index `by` of what it was made for."""
        return Cut(self.threshold, self.last - by)


EVERYTHING = Cut(-math.inf, 1 << 62)
NOTHING = Cut(math.inf, -1)


class Scores:
    """What elements are ranked by: function(block) gives one tensor of scores per selection, float32."""

    def __init__(self, function: Callable[[Block], Sequence[Tensor]]) -> None:
        self.of = function

    def sample(self, block: Block, stride: int) -> list[Tensor]:
        """Every stride-th score of each selection."""
        return [scores.reshape(-1)[::stride] for scores in self.of(block)]

    def count(self, block: Block, brackets: Sequence[Bracket]) -> list[Counted]:
        return [_count(scores, *bracket) for scores, bracket in zip(self.of(block), brackets, strict=True)]

    def equal(self, block: Block, which: int, score: float) -> int:
        """How many scores of one selection are equal to this."""
        return int((self.of(block)[which] == score).sum())

    def place(self, block: Block, which: int, score: float, nth: int) -> int:
        """The place in the block of the nth (from 1) of those."""
        return int((self.of(block)[which].reshape(-1) == score).nonzero()[nth - 1])


class Magnitudes(Scores):
    """The task vectors' magnitudes, each for as many selections as `times` says; native where it can be."""

    def __init__(self, times: int = 1) -> None:
        super().__init__(lambda block: [m for delta in block.deltas() for m in [delta.abs().float()] * times])
        self.times = times

    def sample(self, block: Block, stride: int) -> list[Tensor]:
        if block.raw_base is None or not block.native:
            return super().sample(block, stride)
        found = [merging.sample(block.raw_base, model, stride) for model in block.raw]
        return [sample for sample in found for _ in range(self.times)]

    def count(self, block: Block, brackets: Sequence[Bracket]) -> list[Counted]:
        if block.raw_base is None or not block.native:
            return super().count(block, brackets)
        models = [model for model in block.raw for _ in range(self.times)]
        rows = [merging.count(block.raw_base, m, *bracket) for m, bracket in zip(models, brackets, strict=True)]
        return [Counted(above, low - len(inside), low, low + at_low, inside) for above, low, at_low, inside in rows]

    def equal(self, block: Block, which: int, score: float) -> int:
        if block.raw_base is None or not block.native:
            return super().equal(block, which, score)
        return -merging.equal(block.raw_base, block.raw[which // self.times], score, 0)

    def place(self, block: Block, which: int, score: float, nth: int) -> int:
        if block.raw_base is None or not block.native:
            return super().place(block, which, score, nth)
        return merging.equal(block.raw_base, block.raw[which // self.times], score, nth)


def greatest(view: TensorView | ChainedView, scores: Scores, keeps: Sequence[int]) -> list[Cut]:
    """For each selection of `scores` (one per entry of keeps), the cut that keeps that many elements."""
    cuts = [EVERYTHING if keep >= view.numel else NOTHING if keep <= 0 else None for keep in keeps]
    margin = 4.0
    while None in cuts:
        brackets = _brackets(view, scores, keeps, margin)
        counted = view.map(lambda block: scores.count(block, brackets))  # noqa: B023
        for which, keep in enumerate(keeps):
            if cuts[which] is None:
                cuts[which] = _cut(view, scores, which, keep, brackets[which], [row[which] for row in counted])
        margin *= 16
    return [cut for cut in cuts if cut is not None]


def _brackets(view: TensorView | ChainedView, scores: Scores, keeps: Sequence[int], margin: float) -> list[Bracket]:
    """(low, high) around each threshold, from a strided sample."""
    stride = max(1, view.numel // SAMPLE) | 1  # odd, so that it does not fall on the same columns again and again
    rows = view.map(lambda block: scores.sample(block, stride))
    brackets = []
    for column, keep in zip(zip(*rows, strict=True), keeps, strict=True):
        sample = torch.cat(column).sort(descending=True).values
        share = min(1.0, keep / view.numel)
        place = share * len(sample)
        width = margin * math.sqrt(len(sample) * share * (1 - share)) + 2 * margin
        above, below = math.floor(place - width), math.ceil(place + width)
        high = float(sample[above]) if above >= 0 else math.inf
        low = float(sample[below]) if below < len(sample) else -math.inf
        brackets.append((low, high))
    return brackets


@dataclass(frozen=True)
class Counted:
    """One block's counts against a bracket, and the scores strictly inside it."""

    above: int
    from_high: int
    above_low: int
    from_low: int
    inside: Tensor


def _count(scores_RC: Tensor, low: float, high: float) -> Counted:
    over, over_low = scores_RC > high, scores_RC > low
    inside = scores_RC[over_low & (scores_RC < high)]
    above, above_low = int(over.sum()), int(over_low.sum())
    at_low = int((scores_RC == low).sum())
    return Counted(above, above_low - len(inside), above_low, above_low + at_low, inside)


def _cut(
    view: TensorView | ChainedView,
    scores: Scores,
    which: int,
    keep: int,
    bracket: Bracket,
    counted: list[Counted],
) -> Cut | None:
    """The exact cut, or None when the threshold lies outside the bracket."""
    low, high = bracket
    above, from_high = sum(c.above for c in counted), sum(c.from_high for c in counted)
    above_low, from_low = sum(c.above_low for c in counted), sum(c.from_low for c in counted)
    if not above < keep <= from_low:
        return None
    if keep <= from_high:
        threshold, taken, equal = high, above, from_high - above
    elif keep <= above_low:
        inside = torch.cat([c.inside for c in counted])
        threshold = float(torch.kthvalue(inside, len(inside) - (keep - from_high) + 1).values)
        taken, equal = from_high + int((inside > threshold).sum()), int((inside == threshold).sum())
    else:
        threshold, taken, equal = low, above_low, from_low - above_low
    quota = keep - taken
    return Cut(threshold, view.numel if quota == equal else _last_kept(view, scores, which, threshold, quota))


def _last_kept(view: TensorView | ChainedView, scores: Scores, which: int, threshold: float, quota: int) -> int:
    """Flat index of the quota-th element equal to the threshold."""
    for index, here in enumerate(view.map(lambda block: scores.equal(block, which, threshold))):
        if here >= quota:
            block = view.block(index)
            return block.start + scores.place(block, which, threshold, quota)
        quota -= here
    return view.numel
