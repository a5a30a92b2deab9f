"""Verified mode's fast half: decode ahead with stock kernels, drawing with the request's own noise.

Its guesses cost only time: the engine keeps them as far as the verified rows draw the same tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from gnomon.arch.transformers_network import TransformersNetwork, cut
from gnomon.engine.drafting import Choose


class FastDrafter:
    """Implements `Drafter`."""

    def __init__(self, network: TransformersNetwork) -> None:
        self.network = network
        self._cache: Any = None
        self._text: list[int] = []

    @torch.inference_mode()
    def propose(self, tokens: list[int], most: int, choose: Choose) -> list[int]:
        """Up to `most` guesses of what follows."""
        from transformers import DynamicCache

        same = 0
        for ours, given in zip(self._text, tokens, strict=False):
            if ours != given:
                break
            same += 1
        same = min(same, len(tokens) - 1)
        if self._cache is None:
            self._cache = DynamicCache(config=self.network.model.config)
        cut(self._cache, same)
        guesses: list[int] = []
        fed = tokens[same:]
        while len(guesses) < most:
            out = self.network.model.base_model(
                input_ids=torch.tensor([fed]), past_key_values=self._cache, use_cache=True
            )
            logits = TransformersNetwork.logits(self.network, out.last_hidden_state[0, -1:].float())
            fed = [choose(logits[0], len(guesses))]
            guesses += fed
        self._text = tokens + guesses[:-1]
        return guesses

    def close(self) -> None:
        """The sequence is over."""
        self._cache = None
