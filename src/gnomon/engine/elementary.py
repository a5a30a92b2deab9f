"""exp, log and sums in float64 whose bits are the same on every machine and for every length.

Built from operations that IEEE 754 rounds exactly (+, -, *, /, and integer work), one numpy call each, so neither the
vector width, nor the array's length and alignment, nor the C library can change a bit; numpy's own log may (its vector
loop and its scalar tail differ). Errors stay below 2 units in the last place. In: float64 arrays. Out: new ones.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LOG2_E = float.fromhex("0x1.71547652b82fep+0")
LN2_HIGH = float.fromhex("0x1.62e42fefap-1")  # 37 bits: its product with an exponent is exact
LN2_LOW = float.fromhex("0x1.cf79abc9e3b3ap-40")  # ln 2 - LN2_HIGH
SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
LEAST, MOST = -708.0, 709.0
"""Where exp leaves the normal numbers: below LEAST it is exactly 0, above MOST it stays at exp(MOST)."""

EXP_TERMS = [1 / math.factorial(k) for k in range(13, -1, -1)]  # Taylor on |r| <= ln(2) / 2: remainder < 1e-17
LOG_TERMS = [1 / (2 * k + 1) for k in range(11, -1, -1)]  # atanh series on s^2 <= 0.0295: remainder < 1e-19


def exp(x: Array) -> Array:
    """e ** x; -inf gives 0."""
    clamped = np.minimum(np.maximum(x, LEAST), MOST)
    n = np.rint(clamped * LOG2_E)
    r = clamped - n * LN2_HIGH
    r -= n * LN2_LOW
    result = _horner(EXP_TERMS, r)
    result *= ((n.astype(np.int64) + 1023) << 52).view(np.float64)  # 2 ** n, from its bits
    result[x < LEAST] = 0.0
    return result


def log(x: Array) -> Array:
    """Natural logarithm of positive, finite, normal numbers."""
    m, exponent = np.frexp(x)
    low = (m < SQRT_HALF).astype(np.float64)
    m += m * low
    e = exponent - low
    f = m - 1  # exact
    s = f / (m + 1)
    terms = _horner(LOG_TERMS, s * s)
    terms *= s
    terms *= 2
    terms += e * LN2_LOW
    terms += e * LN2_HIGH
    return terms


def total(x: Array) -> float:
    """Sum by halving: one fixed tree for each length. Empty: 0."""
    if not len(x):
        return 0.0
    part = x.copy()
    n = len(part)
    while n > 1:
        half = (n + 1) // 2
        part[: n - half] += part[half:n]
        n = half
    return float(part[0])


def logsumexp(x: Array) -> float:
    """log(sum(exp(x))); the greatest must be finite."""
    greatest = float(x.max())
    return greatest + float(log(np.array([total(exp(x - greatest))]))[0])


def _horner(coefficients: list[float], x: Array) -> Array:
    """Polynomial in x, highest coefficient first."""
    result = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result *= x
        result += coefficient
    return result
