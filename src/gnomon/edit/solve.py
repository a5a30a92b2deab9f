"""Closed forms: from keys, wanted values and second moments to a change of one weight matrix.

Pure functions on float64 tensors; they know nothing of models. Every one gives the change as factors
(left_CU, right_UM), so that a patch stays small: delta_CM = left_CU @ right_UM.
Legend: C rows of the weight (hidden), M columns (inner), U facts.  W_CM k_M = v_C.
Symbols: C = E[k k^T] the second moment (`moment_MM`), K = keys, R = residuals (wanted minus present values).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon.errors import EditError

Factors = tuple[Tensor, Tensor]


def ridged(moment_MM: Tensor, ridge: float) -> Tensor:
    """C + ridge * tr(C)/M * I, symmetrised, float64: solvable even where the sample left directions empty."""
    moment = moment_MM.double()
    moment = (moment + moment.T) / 2
    size = moment.shape[0]
    return moment + ridge * (torch.trace(moment) / size) * torch.eye(size, dtype=torch.float64)


@dataclass(frozen=True)
class Factor:
    """A Cholesky factor of C, kept to be used for many right-hand sides."""

    lower_MM: Tensor

    @classmethod
    def of(cls, moment_MM: Tensor, ridge: float) -> Factor:
        """Raises EditError when C is not positive definite even with its ridge."""
        lower, info = torch.linalg.cholesky_ex(ridged(moment_MM, ridge))
        if int(info) != 0 or not bool(torch.isfinite(lower).all()):
            raise EditError(
                "The second moment of the keys cannot be inverted: too little text, or not finite.",
                hint="Use more tokens for the moments, or a larger `ridge`.",
            )
        return cls(lower)

    def solve(self, right: Tensor) -> Tensor:
        """C^-1 right."""
        return torch.cholesky_solve(right.double(), self.lower_MM)


def rank_one(factor: Factor, key_M: Tensor, residual_C: Tensor, read_key_M: Tensor | None = None) -> Factors:
    """ROME (arXiv 2202.05262, eq. 2): the smallest change in C's metric with (W + delta) k = v.

    delta = r u^T with u = C^-1 k / |C^-1 k| and r = (v - W k_p) / (k_p^T u). read_key: k_p; the paper reads the bare
    prompt's key there, R-ROME (2403.07175) the same averaged key, which is the default and keeps the change bounded.
    """
    key = key_M.double()
    direction = factor.solve(key[:, None])[:, 0]
    direction = direction / direction.norm()
    reading = key if read_key_M is None else read_key_M.double()
    along = torch.dot(reading, direction)
    finite(along, "the key's projection")
    return finite(residual_C.double() / along, "the update")[:, None], direction[None]


def detector(
    factor: Factor, keys_MB: Tensor, damping: float, avoided_MN: Tensor | None = None, avoid: float = 0.0
) -> Tensor:
    """The direction u that answers 1 at every key of a subject and least elsewhere -> [M].

    min u^T C' u + damping-softened K^T u = 1, hence u = C'^-1 K (K^T C'^-1 K + damping I)^-1 1: EMMET's equality
    (2403.14236) over one fact's contexts. C' = C + avoid/N * sum n n^T counts keys that must stay as they are (those of
    other subjects in the same sentence) as ordinary text; its inverse by Woodbury. One key and no damping is ROME's u.
    """
    keys = keys_MB.double()
    solved = factor.solve(keys)
    if avoided_MN is not None and avoid > 0:
        others = avoided_MN.double()
        turned = factor.solve(others)
        size = others.shape[1]
        inner = others.T @ turned + (size / avoid) * torch.eye(size, dtype=torch.float64)
        solved = solved - turned @ torch.linalg.solve(inner, turned.T @ keys)
    gram = keys.T @ solved + damping * torch.eye(keys.shape[1], dtype=torch.float64)
    ones = torch.ones(keys.shape[1], 1, dtype=torch.float64)
    return finite(solved @ torch.linalg.solve(gram, ones), "the solve")[:, 0]


def least_squares(factor: Factor, keys_MU: Tensor, residual_CU: Tensor, weight: float) -> Factors:
    """MEMIT (2210.07229, eq. 14): delta = R K^T (weight C + K K^T)^-1, in Woodbury's form (U x U)."""
    keys = keys_MU.double()
    solved = factor.solve(keys) / weight
    inner = torch.eye(keys.shape[1], dtype=torch.float64) + keys.T @ solved
    right = torch.linalg.solve(inner, solved.T)
    return residual_CU.double(), finite(right, "the solve")


def equality(factor: Factor, keys_MU: Tensor, residual_CU: Tensor, damping: float) -> Factors:
    """EMMET (2403.14236): ROME's equality constraint for a batch, A = C^-1 K (K^T C^-1 K + damping I)^-1."""
    keys = keys_MU.double()
    solved = factor.solve(keys)
    inner = keys.T @ solved + damping * torch.eye(keys.shape[1], dtype=torch.float64)
    return residual_CU.double(), finite(torch.linalg.solve(inner, solved.T), "the solve")


@dataclass(frozen=True)
class NullSpace:
    """Directions in which ordinary keys have almost no energy. energy: their share of tr(C)."""

    basis_MN: Tensor
    energy: float

    @classmethod
    def of(cls, moment_MM: Tensor, share: float) -> NullSpace:
        """The smallest eigendirections of C that together hold at most `share` of its trace.

        AlphaEdit's fixed threshold (2e-2) marks directions with real energy in small models, so the share decides.
        Raises EditError when no direction, or every one, is free.
        """
        moment = (moment_MM.double() + moment_MM.double().T) / 2
        values, vectors = torch.linalg.eigh(moment)
        cumulative = values.clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
        count = int((cumulative <= share).sum())
        if count in (0, len(values)):
            raise EditError(
                f"The null space of the keys has {count} of {len(values)} directions at an energy share of {share}.",
                hint="Choose another `null_energy`.",
            )
        return cls(vectors[:, :count], float(cumulative[count - 1]))


def null_space(
    space: NullSpace, keys_MU: Tensor, residual_CU: Tensor, damping: float, history_MM: Tensor | None = None
) -> Factors:
    """AlphaEdit (2410.02355, eq. 14): (P (K K^T + Kp Kp^T) + damping I) X = P K R^T, delta = X^T.

    Solved inside the null space, P = B B^T, so the matrix stays symmetric and the change exactly free of the rest.
    history_MM: Kp Kp^T, the keys of earlier edits.
    """
    basis, keys = space.basis_MN, keys_MU.double()
    inner = basis.T @ keys
    gram = inner @ inner.T + damping * torch.eye(basis.shape[1], dtype=torch.float64)
    if history_MM is not None:
        gram = gram + basis.T @ history_MM.double() @ basis
    solved = torch.linalg.solve(gram, inner)
    return residual_CU.double(), finite((basis @ solved).T, "the solve")


def keep_relative(delta_CM: Tensor, weight_CM: Tensor, share: float) -> Tensor:
    """RECT (2401.04700): keep the `share` of entries with the largest |delta / W|; zero elsewhere."""
    relative = (delta_CM / weight_CM).abs().flatten()
    count = max(1, round(share * relative.numel()))
    kept = torch.zeros_like(delta_CM).flatten()
    chosen = relative.topk(count).indices
    kept[chosen] = delta_CM.flatten()[chosen]
    return kept.view_as(delta_CM)


def restrain(delta_CM: Tensor, weight_CM: Tensor) -> Tensor:
    """PRUNE (2405.16821): singular values of the whole change above those of W become log(s) - log(max) + max."""
    left, values, right = torch.linalg.svd(delta_CM.double(), full_matrices=False)
    limit = torch.linalg.matrix_norm(weight_CM.double(), 2)
    bent = torch.where(values > limit, values.log() - limit.log() + limit, values)
    restrained: Tensor = left @ torch.diag(bent) @ right
    return restrained


def finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor, or EditError when a number in it is not finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise EditError(
            f"{what[0].upper()}{what[1:]} is not finite; nothing was changed.",
            hint="Use more tokens for the moments, or a larger `ridge`.",
        )
    return tensor
