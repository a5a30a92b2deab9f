"""The numeric profile: everything that can change a bit of the output, and its fingerprint.

Two profiles are never mixed inside one request; equal fingerprints promise equal bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gnomon.kernels.batch import PAGE
from gnomon.kernels.operators import Operators


@dataclass(frozen=True)
class NumericProfile:
    """weights: the checkpoint's identity. kernel_details: kernel version, or torch build and CPU class.

    beside: identities of the patches that run beside the weights, in order.
    """

    weights: str
    network: str
    dtype: str
    kernel: str
    kernel_details: Mapping[str, Any] = field(default_factory=dict)
    key_value_dtype: str = "fp32"
    page: int = PAGE
    beside: tuple[str, ...] = ()

    @classmethod
    def of(cls, weights: str, network: str, operators: Operators) -> NumericProfile:
        return cls(weights, network, operators.dtype, operators.kernel, operators.description())

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: fp_ and the first 12 hex digits of the profile's sha256."""
        return "fp_" + hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]

    def as_dict(self) -> dict[str, Any]:
        values = {**self.__dict__, "kernel_details": dict(self.kernel_details), "beside": list(self.beside)}
        return values if self.beside else {key: value for key, value in values.items() if key != "beside"}

    def with_patches(self, identities: Sequence[str]) -> NumericProfile:
        """With these patches beside the weights, after those that are there."""
        return replace(self, beside=(*self.beside, *identities)) if identities else self

    def with_changed_weights(self, changed: Mapping[str, str]) -> NumericProfile:
        """After tensors were changed in place. changed: tensor name -> sha256 of its new bytes."""
        canonical = json.dumps([self.weights, sorted(changed.items())])
        return replace(self, weights=hashlib.sha256(canonical.encode()).hexdigest())
