"""The sentinel: now and then a finished request is decoded a second time, in whatever company there is then.

Its tokens and the checksums of their logits must be the same. A difference is counted and logged: an alarm, because
it means that this machine breaks the promise. Only requests without logits stages are repeated: stages have a state.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from gnomon.engine.request import Finished, Request
from gnomon.engine.sequence import Sequence

log = logging.getLogger("gnomon.engine")

LAST = 1 << 30
"""The priority of repetitions: after everybody else, and the first to be put back."""
PREFIX = "sentinel-"


class Sentinel:
    """Chooses every `every`-th eligible request (0: none), remembers what it saw, and judges the repetition."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.replays = 0
        self.mismatches = 0
        self._eligible = 0
        self._seen: dict[str, list[tuple[int, int]]] = {}
        self._expected: dict[str, list[tuple[int, int]]] = {}

    def admit(self, request: Request) -> None:
        """A request enters; perhaps it is the one to watch."""
        if not self.every or request.id.startswith(PREFIX) or request.fuse or request.bias or request.mask:
            return
        self._eligible += 1
        if self._eligible % self.every == 0:
            self._seen[request.id] = []

    def forget(self) -> None:
        """What was seen so far cannot be repeated: the weights changed."""
        self._seen.clear()
        for expected in self._expected.values():
            expected.clear()

    def watches(self, request: Request) -> bool:
        return request.id in self._seen or request.id in self._expected

    def drawn(self, sequence: Sequence, token_id: int, checksum: int) -> None:
        """A watched request or a repetition drew a token from logits of this checksum."""
        request, index = sequence.request, len(sequence.sampler.generated)
        if request.id in self._seen:
            self._seen[request.id].append((token_id, checksum))
            return
        expected = self._expected[request.id]
        if index < len(expected) and expected[index] != (token_id, checksum):
            what = "another token" if expected[index][0] != token_id else "other logits"
            log.error("Request %s, decoded again, gave %s at token %d: not deterministic!", request.id, what, index)
            self.mismatches += 1
            self._expected[request.id] = []

    def ended(self, sequence: Sequence, finished: Finished) -> Request | None:
        """A request ended: its repetition, if it was watched and is worth it."""
        request = sequence.request
        if self._expected.pop(request.id, None) is not None:
            self.replays += finished.reason == "length"
            return None
        seen = self._seen.pop(request.id, None)
        if not seen or finished.reason not in ("stop", "length") or sequence.sampler.rollbacks:
            return None
        name = PREFIX + request.id
        self._expected[name] = seen
        sampling = replace(
            request.sampling,
            max_tokens=len(seen),
            min_tokens=min(request.sampling.min_tokens, len(seen)),
            logprobs=None,
            prompt_logprobs=None,
        )
        return Request(
            id=name,
            prompt_ids=request.prompt_ids,
            sampling=sampling,
            stream_index=request.stream_index,
            priority=LAST,
            cache_salt=name,  # computed anew: a warm prefix is compared with a cold one
            sides=request.sides,
            side_names=request.side_names,
        )
