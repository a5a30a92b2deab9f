"""One request's sampler: logits in, the next token out.

Order of a step: fusion, (log-probabilities are taken), penalties, bias, masks, temperature, top_k, top_p, min_p, seeded
Gumbel draw. It knows its own request and nothing of batches: the same logits and history give the same token anywhere.
Vectorised over the vocabulary; whatever is skipped for speed is skipped only where it provably cannot win.
Legend: V vocabulary; z logits over temperature, greatest 0; K kept tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gnomon.engine.elementary import Array, exp, total
from gnomon.engine.logprobs import Logprobs, largest
from gnomon.engine.philox import Noise, gumbel, uniform
from gnomon.engine.request import LogitsStage, Request, SamplingParams
from gnomon.errors import EngineFailure, GnomonError

Ids = NDArray[np.int64]

LN2 = 0.6931471805599453
MARGIN = 1e-6
"""Far above the rounding of z + noise, far below what pruning saves."""


@dataclass(frozen=True)
class Draw:
    """A sampled token. logprob and top only when the request asked for them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class RequestSampler:
    """Draws the tokens of one request; holds its stages, its history and its place in the noise."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        self.request = request
        self.params: SamplingParams = request.sampling
        self.vocab_size = vocab_size
        self.stages: list[LogitsStage] = [*request.fuse, *request.bias, *request.mask]
        self.generated: list[int] = []
        self.counts: Counter[int] = Counter()
        self.rollbacks = 0
        self.prompt_tokens = np.unique(np.array(request.prompt_ids, dtype=np.int64)) if self.params.penalised else None

    def draw(self, logits_V: Tensor) -> Draw:
        """The next token for these logits, which may be edited in place.

        Raises EngineFailure when the logits are not numbers, a stage fails, or no token is left.
        """
        for stage in self.request.fuse:
            logits_V = self._process(stage, logits_V)
        self._check(logits_V, "the network" if not self.request.fuse else _name(self.request.fuse[-1]))
        logprobs = None
        if self.params.logprobs is not None:
            logprobs = Logprobs.of(logits_V.numpy().copy(), self.params.logprobs)
        if self.params.penalised:
            self._penalise(logits_V.numpy())
        for stage in [*self.request.bias, *self.request.mask]:
            logits_V = self._process(stage, logits_V)
            self._check(logits_V, _name(stage))
        if len(self.generated) < self.params.min_tokens and self.params.ends:
            logits_V[torch.tensor(sorted(self.params.ends))] = -torch.inf
            self._check(logits_V, "min_tokens")
        token_id = self._choose(logits_V.numpy())
        if logprobs is None:
            return Draw(token_id)
        return Draw(token_id, logprobs.of_token(token_id), logprobs.top)

    def guess(self, logits_V: Tensor, ahead: int) -> int:
        """What `draw` would choose from these logits for the token `ahead` places after the next, stages aside."""
        return self._choose(logits_V.numpy(), ahead)

    def accept(self, token_id: int) -> None:
        """The token now belongs to the text."""
        self.generated.append(token_id)
        self.counts[token_id] += 1
        for stage in self.stages:
            stage.accept(token_id)

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens; what is drawn in their place gets new noise."""
        self.counts -= Counter(self.generated[-count:])
        del self.generated[-count:]
        self.rollbacks += 1
        for stage in self.stages:
            stage.rollback(count)

    def _process(self, stage: LogitsStage, logits_V: Tensor) -> Tensor:
        """Run one stage; whatever it raises, or gives back unusable, ends this request alone."""
        try:
            result = stage.process(logits_V, self.generated)
        except GnomonError:
            raise
        except Exception as error:
            raise EngineFailure(f"The stage {_name(stage)} failed at {self._place()}: {error!r}.") from error
        if result.shape != (self.vocab_size,):
            raise EngineFailure(
                f"The stage {_name(stage)} returned logits of shape {list(result.shape)}, not [{self.vocab_size}]."
            )
        return result.to(torch.float32).contiguous()

    def _check(self, logits_V: Tensor, after: str) -> None:
        """At least one token must be possible, and nothing may be NaN or +inf."""
        greatest = float(logits_V.numpy().max())
        if greatest == -np.inf:
            raise EngineFailure(
                f"{after} masked every token at {self._place()}.", hint="Loosen the constraints of this request."
            )
        if not np.isfinite(greatest):
            raise EngineFailure(f"{after} gave logits that are not numbers ({greatest}) at {self._place()}.")

    def _place(self) -> str:
        return f"generated token {len(self.generated)}"

    def _penalise(self, row_V: NDArray[np.float32]) -> None:
        """Repetition over prompt and output, then frequency and presence over output, as vLLM and OpenAI do."""
        params = self.params
        output = np.fromiter(self.counts.keys(), dtype=np.int64, count=len(self.counts))
        if params.repetition_penalty != 1:
            assert self.prompt_tokens is not None
            seen = np.union1d(self.prompt_tokens, output)
            penalty = np.float32(params.repetition_penalty)
            row_V[seen] = np.where(row_V[seen] > 0, row_V[seen] / penalty, row_V[seen] * penalty)
        times = np.fromiter(self.counts.values(), dtype=np.float32, count=len(self.counts))
        row_V[output] -= np.float32(params.frequency_penalty) * times
        row_V[output] -= np.float32(params.presence_penalty)

    def _choose(self, row_V: NDArray[np.float32], ahead: int = 0) -> int:
        """Greedy: the greatest, lowest id among equals. Otherwise filter and draw."""
        best = int(row_V.argmax())
        if self.params.greedy:
            return best
        z_V = (row_V.astype(np.float64) - float(row_V[best])) / self.params.temperature
        noise = Noise(self.params.seed, self.request.stream_index, len(self.generated) + ahead, self.rollbacks)
        kept_K = filter_tokens(z_V, self.params.top_k, self.params.top_p, self.params.min_p)
        if kept_K is None:
            return draw_all(z_V, noise)
        return draw_among(z_V, kept_K, noise)


def filter_tokens(z_V: Array, top_k: int, top_p: float, min_p: float) -> Ids | None:
    """Ids that pass top_k, then top_p over what is left, then min_p relative to the best; None when all do."""
    order_K: Ids | None = None
    if 0 < top_k < len(z_V):
        order_K = largest(z_V, top_k)
    if top_p < 1:
        order_K = _nucleus(z_V, top_p) if order_K is None else _shortest(order_K, exp(z_V[order_K]), top_p)
    if min_p > 0:
        order_K = np.arange(len(z_V)) if order_K is None else order_K
        order_K = order_K[exp(z_V[order_K]) >= min_p]
    return order_K


def _nucleus(z_V: Array, top_p: float) -> Ids:
    """top_p over the whole vocabulary: sorts only as many of the greatest as the mass needs."""
    mass_V = exp(z_V)
    needed = top_p * total(mass_V)
    count = 128
    while True:
        order = largest(z_V, count)
        cumulative = np.cumsum(mass_V[order])
        if cumulative[-1] >= needed or count >= len(z_V):
            return order[: int(np.searchsorted(cumulative, needed)) + 1]
        count *= 8


def _shortest(order_K: Ids, mass_K: Array, top_p: float) -> Ids:
    """The shortest beginning of this order that holds top_p of its mass."""
    cumulative = np.cumsum(mass_K)
    return order_K[: int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1]


def draw_among(z_V: Array, kept_K: Ids, noise: Noise) -> int:
    """The winner of z + Gumbel noise among these tokens, lowest id among equals. Masked tokens get no noise."""
    ids = np.sort(kept_K)
    ids = ids[z_V[ids] > -np.inf]
    scores = z_V[ids] + gumbel(uniform(noise.draws(ids)))
    return int(ids[scores.argmax()])


def draw_all(z_V: Array, noise: Noise) -> int:
    """`draw_among` the whole vocabulary, with the logarithms only for tokens that can still win.

    With u the uniform, -log u >= 1 - u, hence noise <= -log(1 - u) <= (1 - e) log 2 where 1 - u < 2**e: a bound read
    off the exponent bits. The luckiest tokens' exact scores rule out all whose bound lies below.
    """
    u_V = uniform(noise.all_draws(len(z_V)))
    bound_V = z_V + (1 - np.frexp(1 - u_V)[1]) * LN2
    likely = np.flatnonzero(bound_V >= bound_V.max() - 2)
    reached = (z_V[likely] + gumbel(u_V[likely])).max()
    ids = np.flatnonzero(bound_V >= reached - MARGIN)
    scores = z_V[ids] + gumbel(u_V[ids])
    return int(ids[scores.argmax()])


def _name(stage: LogitsStage) -> str:
    """A stage as errors name it."""
    return type(stage).__name__
