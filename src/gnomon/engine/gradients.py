"""The log-probability of a token as the sampler takes it, with a gradient.

One float64 definition (logprobs.py) serves sampling and training, so the two differ by nothing at all.
Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gnomon.engine.elementary import logsumexp
from gnomon.kernels.rowwise import native_logsumexp


def normalisers(logits_RV: Tensor) -> Tensor:
    """log(sum(exp(row))) -> [R] float64, natively where that is built: the same bits."""
    found = native_logsumexp(logits_RV)
    if found is not None:
        return found
    rows = logits_RV.numpy().astype("float64")
    return torch.tensor([logsumexp(row) for row in rows], dtype=torch.float64)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, token_ids_R: Tensor) -> Tensor:
        plain_RV = logits_RV.detach().float().contiguous()
        normaliser_R = normalisers(plain_RV)
        ctx.save_for_backward(plain_RV, token_ids_R, normaliser_R)
        return plain_RV.gather(1, token_ids_R[:, None])[:, 0].double() - normaliser_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            logits_RV, token_ids_R, normaliser_R = ctx.saved_tensors
            grad_R1 = grads[0].float()[:, None]
            of_logits_RV = (logits_RV - normaliser_R.float()[:, None]).exp_().mul_(-grad_R1)
            return of_logits_RV.scatter_add_(1, token_ids_R[:, None], grad_R1), None


def token_logprobs(logits_RV: Tensor, token_ids_R: Tensor) -> Tensor:
    """Each row's log-probability of its token -> [R] float64, bit-equal to what the engine reports."""
    with torch._C.DisableTorchFunction():
        result: Tensor = _TokenLogprobs.apply(logits_RV, token_ids_R)  # type: ignore[no-untyped-call]
        return result
