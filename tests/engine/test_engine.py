"""The engine's edges: limits, failures, rollback, stages, cancellation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gnomon.engine.engine import Engine
from gnomon.engine.request import Decision, Finished, Request, SamplingParams, TokenEvent
from gnomon.engine.worker import EngineWorker
from gnomon.errors import ContextLengthExceeded, EngineFailure, NotReady, OutOfMemory, PromptError, UsageError
from gnomon.kernels.batch import Span

VOCABULARY = 20


class ScriptedRunner:
    """Prefers token (last + 1) % VOCABULARY; fails when it sees token 13."""

    vocab_size = VOCABULARY
    shares_pages = True

    def __init__(self, page_count: int = 4, max_context: int = 200) -> None:
        self.page_count = page_count
        self.max_context = max_context

    def step(self, spans: list[Span]) -> list[Tensor]:
        if any(13 in span.token_ids for span in spans):
            raise RuntimeError("unlucky")
        rows = []
        for span in spans:
            wanted = {"none": [], "last": span.token_ids[-1:], "all": span.token_ids}[span.wants]
            logits = torch.zeros(len(wanted), VOCABULARY)
            for row, token in enumerate(wanted):
                logits[row, (token + 1) % VOCABULARY] = 5.0
            rows.append(logits)
        return rows

    def hidden(self, spans: list[Span]) -> list[Tensor]:
        return [torch.ones(len(span.token_ids), 2) for span in spans]

    def copy_page(self, source: int, target: int) -> None:
        """It reads no pages."""

    def release(self, sequence: int) -> None:
        """No caches."""


def run(engine: Engine, request: Request) -> tuple[list[int], Finished]:
    tokens: list[int] = []
    ends: list[Finished] = []
    inner = request.on_token

    def on_token(event: TokenEvent) -> Decision:
        tokens.append(event.token_id)
        return inner(event)

    request.on_token = on_token
    request.on_finish = ends.append
    engine.submit(request)
    while engine.step():
        pass
    assert len(ends) == 1
    return tokens, ends[0]


def request(prompt: Sequence[int] = (0,), **params: object) -> Request:
    defaults: dict[str, object] = {"seed": 0, "max_tokens": 4}
    return Request(id="r", prompt_ids=list(prompt), sampling=SamplingParams(**(defaults | params)))  # type: ignore[arg-type]


def test_greedy_follows_the_most_likely_token_to_the_limit() -> None:
    tokens, finished = run(Engine(ScriptedRunner()), request([0], max_tokens=4))
    assert tokens == [1, 2, 3, 4]
    assert finished.reason == "length"


def test_an_end_token_stops_and_ignore_eos_goes_on() -> None:
    tokens, finished = run(Engine(ScriptedRunner()), request([0], eos_token_ids=frozenset({3}), max_tokens=6))
    assert (tokens, finished.reason) == ([1, 2, 3], "stop")
    ended = request([0], eos_token_ids=frozenset({3}), ignore_eos=True, max_tokens=6)
    assert run(Engine(ScriptedRunner()), ended)[0] == [1, 2, 3, 4, 5, 6]


def test_min_tokens_holds_the_end_back() -> None:
    early = request([2], eos_token_ids=frozenset({3}), min_tokens=2, max_tokens=5)
    tokens, _ = run(Engine(ScriptedRunner()), early)
    assert tokens[0] != 3 and len(tokens) >= 2


@pytest.mark.parametrize(
    ("prompt", "params", "error", "says"),
    [
        ([], {}, PromptError, "empty"),
        ([0, 99], {}, PromptError, "99"),
        ([0] * 200, {}, ContextLengthExceeded, "204"),
        ([0] * 100, {"max_tokens": 150}, ContextLengthExceeded, "250"),
        ([0] * 100, {"max_tokens": 50}, OutOfMemory, "pages"),
    ],
)
def test_what_can_never_run_is_refused_at_the_door(
    prompt: list[int], params: dict[str, int], error: type, says: str
) -> None:
    engine = Engine(ScriptedRunner(page_count=2))
    with pytest.raises(error, match=says):
        engine.submit(request(prompt, **params))
    assert not engine.sequences


def test_a_failing_step_ends_its_requests_and_the_engine_lives_on() -> None:
    engine = Engine(ScriptedRunner())
    _, finished = run(engine, request([13]))
    assert finished.reason == "error" and isinstance(finished.error, EngineFailure)
    assert run(engine, request([0], max_tokens=2))[0] == [1, 2]
    assert engine.stats().pages_used == 0


class Forbid:
    """A mask stage that forbids some tokens and remembers what it was told."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.accepted: list[int] = []

    def process(self, logits_V: Tensor, generated: Sequence[int]) -> Tensor:
        logits_V[self.tokens] = -torch.inf
        return logits_V

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)

    def rollback(self, count: int) -> None:
        del self.accepted[-count:]

    def copy(self) -> Forbid:
        return Forbid(list(self.tokens))


def test_a_mask_that_leaves_nothing_ends_its_request_with_the_stages_name() -> None:
    doomed = request()
    doomed.mask = [Forbid(list(range(VOCABULARY)))]
    _, finished = run(Engine(ScriptedRunner()), doomed)
    assert finished.error is not None and "Forbid" in str(finished.error)


def test_a_rollback_takes_tokens_back_from_engine_and_stages() -> None:
    stage = Forbid([])
    rolled = request([0], max_tokens=5)
    rolled.mask = [stage]
    seen: list[int] = []

    def on_token(event: TokenEvent) -> Decision:
        seen.append(event.token_id)
        if seen == [1, 2, 3]:
            stage.tokens = [2]
            return Decision.rollback(2)
        return Decision.CONTINUE

    rolled.on_token = on_token
    tokens, finished = run(Engine(ScriptedRunner()), rolled)
    assert tokens[:3] == [1, 2, 3] and tokens[3] != 2
    assert len(stage.accepted) == finished.completion_tokens == 5
    assert stage.accepted[0] == 1


def test_cancelling_frees_the_pages_before_the_next_step() -> None:
    engine = Engine(ScriptedRunner())
    ends: list[Finished] = []
    endless = request([0] * 100, max_tokens=50)
    endless.on_finish = ends.append
    engine.submit(endless)
    engine.step()
    assert engine.stats().pages_used == 2
    engine.cancel("r")
    engine.step()
    assert ends[0].reason == "cancelled"
    assert engine.stats().pages_used == 0


def test_a_callback_that_raises_ends_only_its_own_request() -> None:
    def bad(event: TokenEvent) -> Decision:
        raise ValueError("broken callback")

    engine = Engine(ScriptedRunner())
    broken = request()
    broken.on_token = bad
    assert run(engine, broken)[1].reason == "error"
    assert run(engine, request([0], max_tokens=1))[0] == [1]


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("seed", -1), ("logprobs", 21)],
)
def test_parameters_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=field):
        request(**{field: value})


def test_a_closed_worker_ends_what_runs_and_refuses_what_comes() -> None:
    worker = EngineWorker(ScriptedRunner())
    ends: list[Finished] = []
    started = request([0], max_tokens=150)
    started.on_finish = ends.append
    worker.submit(started)
    worker.close()
    worker.close()
    assert [finished.reason for finished in ends] in (["cancelled"], ["length"])
    with pytest.raises(NotReady):
        worker.submit(request())


def test_a_worker_runs_functions_between_steps_and_hands_back_their_errors() -> None:
    worker = EngineWorker(ScriptedRunner())
    assert worker.run_exclusive(lambda: 41 + 1) == 42
    with pytest.raises(ZeroDivisionError):
        worker.run_exclusive(lambda: 1 // 0)
    assert worker.logits([0, 5]).argmax(-1).tolist() == [1, 6]
    worker.close()
