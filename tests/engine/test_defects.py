"""The mutation suite: defects that other engines have, injected one by one, and each is found by the certificate.

One test-only build of the kernels (defects.cpp) takes its defect by number at run time; defects of the engine and of
the sampler are patched in. A promise whose test cannot fail is worth nothing: here every test fails on purpose.
"""

from __future__ import annotations

import ctypes
import os
import platform
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import need
from gnomon.arch.network import Network, build_network
from gnomon.engine import engine, logprobs, pages, probes, sampler
from gnomon.engine.certificate import certify
from gnomon.engine.engine import Engine
from gnomon.engine.scheduler import Scheduler
from gnomon.engine.sequence import Sequence
from gnomon.kernels import _native, make_operators
from gnomon.kernels.native_operators import NativeOperators
from gnomon.models.reference import open_checkpoint
from helpers.tiny import write_tiny_model

pytestmark = pytest.mark.timeout(900)  # the test-only build takes some seconds of a quiet machine
ROOT = Path(__file__).parents[2]

KERNEL_DEFECTS = {
    "split sums from eight rows on": (1, "fp32"),
    "split sums from eight rows on, bf16": (1, "bf16"),
    "an own path for one row": (2, "fp32"),
    "tail rows one by one": (3, "fp32"),
    "unfused in tiles": (4, "bf16"),
    "columns by threads": (5, "fp32"),
    "another tree for pairs of rows": (6, "fp32"),
    "one activation scale for the batch": (7, "int8"),
    "byte pairs that saturate from eight rows on": (8, "int8"),
    "keys split by load": (9, "fp32"),
    "key blocks counted from the chunk": (10, "fp32"),
    "stale keys times zero": (11, "fp32"),
    "a gate with a tail": (12, "fp32"),
    "a norm by rows": (13, "fp32"),
    "the caller's rounding mode": (14, "fp32"),
}
"""Name -> number in defects.cpp and the profile it is tried in."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test-only build."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    need(compiler is not None, "there is no C++ compiler for the test-only build", "GNOMON_REQUIRE_NATIVE")
    assert compiler is not None
    target = tmp_path_factory.mktemp("defects") / "libdefects.so"
    wide = ["-march=x86-64-v3"] if _runs("v3") else []
    flags = ["-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", *wide]
    source = Path(__file__).with_name("defects.cpp")
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)], check=True)
    return target


def _runs(isa: str) -> bool:
    return platform.machine() in ("x86_64", "AMD64") and bool(_native.open_library(isa).gnomon_supported())


@pytest.fixture
def inject(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Operators made from now on use the test-only build, sound until a defect is injected."""
    opened = ctypes.CDLL(str(library))
    monkeypatch.setattr(_native, "open_library", lambda isa=None: opened)
    yield lambda number: opened.gnomon_inject(number)
    opened.gnomon_inject(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def native(folder: Path, dtype: str = "fp32") -> Network:
    return build_network(open_checkpoint(folder), NativeOperators(dtype, 1))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_the_test_only_build_without_a_defect_is_the_product(
    folder: Path, dtype: str, inject: Callable[[int], None]
) -> None:
    certificate = certify(native(folder, dtype), "fp_x", {})
    assert certificate.passed, certificate.probes
    with pytest.MonkeyPatch.context() as patch:
        patch.undo()
        product = ctypes.CDLL(str(next(_native.folder().glob("libgnomon_generic.*"))))
        patch.setattr(_native, "open_library", lambda isa=None: product)
        assert certify(native(folder, dtype), "fp_x", {}).digest == certificate.digest


@pytest.mark.parametrize("name", KERNEL_DEFECTS)
def test_a_defect_of_a_kernel_is_found(name: str, folder: Path, inject: Callable[[int], None]) -> None:
    number, dtype = KERNEL_DEFECTS[name]
    network = native(folder, dtype)
    inject(number)
    certificate = certify(network, "fp_x", {})
    assert not certificate.passed
    assert any(probe.detail for probe in certificate.probes)


Patch = Callable[[pytest.MonkeyPatch], None]


def noise_in_batch_order(patch: pytest.MonkeyPatch) -> None:
    """Sampling that draws from one generator, whoever asks first."""
    generator = torch.Generator().manual_seed(0)

    def choose(self: sampler.RequestSampler, row_V: Any) -> int:
        return int(torch.multinomial(torch.softmax(torch.from_numpy(row_V), -1), 1, generator=generator))

    patch.setattr(sampler.RequestSampler, "_choose", choose)


def noise_by_draws(patch: pytest.MonkeyPatch) -> None:
    """A counter that counts draws: what was drawn for drafts that were then dropped shifts it."""
    plain, drawn = sampler.Noise, iter(range(10**6))
    patch.setattr(sampler, "Noise", lambda seed, stream, position, rollbacks: plain(seed, stream, next(drawn), 0))


def ties_by_chance(patch: pytest.MonkeyPatch) -> None:
    """The greatest logit, any of them."""
    rng = random.Random(0)

    def choose(self: sampler.RequestSampler, row_V: Any) -> int:
        return rng.choice(np.flatnonzero(row_V == row_V.max()).tolist())

    patch.setattr(sampler.RequestSampler, "_choose", choose)


def unstable_order(patch: pytest.MonkeyPatch) -> None:
    """A sort that leaves equals in the order of a partition."""
    patch.setattr(sampler, "largest", lambda row_V, count: np.argpartition(-row_V, count)[:count])


def uniform_that_reaches_one(patch: pytest.MonkeyPatch) -> None:
    """Float32 uniforms: the highest draws round to 1, whose noise is infinite."""
    for user in (sampler, probes):
        patch.setattr(user, "uniform", lambda draws: ((draws + 0.5) * 2.0**-32).astype(np.float32).astype(float))


def logprobs_of_the_prompt_in_float32(patch: pytest.MonkeyPatch) -> None:
    """Another definition for the echo than for generated tokens."""

    class Rounded(logprobs.Logprobs):
        def of_token(self, token_id: int) -> float:
            return float(np.float32(super().of_token(token_id)))

    patch.setattr(engine, "Logprobs", Rounded)


def pages_named_without_their_past(patch: pytest.MonkeyPatch) -> None:
    """A cache key over a page's own tokens only."""

    def chain(self: pages.PagePool, token_ids: Any, salt: str) -> list[bytes]:
        size = pages.PAGE
        return [
            bytes(str([salt, token_ids[at : at + size]]), "ascii") for at in range(0, len(token_ids) - size + 1, size)
        ]

    patch.setattr(pages.PagePool, "chain", chain)


def pages_named_without_the_salt(patch: pytest.MonkeyPatch) -> None:
    """A cache key that lacks what separates tenants and patches."""
    plain = pages.PagePool.chain
    patch.setattr(pages.PagePool, "chain", lambda self, token_ids, salt: plain(self, token_ids, ""))


def wrong_page_found(patch: pytest.MonkeyPatch) -> None:
    """A cache that forgets to compare what lies in the page."""
    plain = pages.PagePool.find
    patch.setattr(pages.PagePool, "find", lambda self, keys, ids: [page ^ 1 for page in plain(self, keys, ids)])


def put_back_without_recompute(patch: pytest.MonkeyPatch) -> None:
    """A sequence that lost its pages but not its count."""
    plain = Scheduler._put_back

    def put_back(self: Scheduler, sequence: Sequence) -> None:
        computed = sequence.computed
        plain(self, sequence)
        sequence.computed = max(0, computed - 1)

    patch.setattr(Scheduler, "_put_back", put_back)
    patch.setattr(Scheduler, "_read_cache", lambda self, sequence: None)


def drafts_believed(patch: pytest.MonkeyPatch) -> None:
    """Every second draft is taken without drawing."""
    plain = Engine._confirm

    def confirm(self: Engine, sequence: Sequence, drafts: list[int], logits_RV: Any) -> None:
        if drafts and sequence.request.id in self.sequences and len(sequence.tokens) % 2:
            sequence.tokens[-1] = drafts[0]
        plain(self, sequence, drafts, logits_RV)

    patch.setattr(Engine, "_confirm", confirm)


def position_from_the_chunk(patch: pytest.MonkeyPatch) -> None:
    """Positions that begin anew with each chunk of a prompt."""
    from gnomon.arch.decoder import RotaryTable

    plain = RotaryTable.at
    patch.setattr(RotaryTable, "at", lambda self, positions_T: plain(self, positions_T - positions_T[0] % 16))


ENGINE_DEFECTS: list[Patch] = [
    noise_in_batch_order,
    noise_by_draws,
    ties_by_chance,
    unstable_order,
    uniform_that_reaches_one,
    logprobs_of_the_prompt_in_float32,
    pages_named_without_their_past,
    pages_named_without_the_salt,
    wrong_page_found,
    put_back_without_recompute,
    drafts_believed,
    position_from_the_chunk,
]


@pytest.mark.parametrize("defect", ENGINE_DEFECTS, ids=lambda defect: defect.__name__)
def test_a_defect_of_the_engine_is_found(defect: Patch, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_network(open_checkpoint(folder), make_operators("fp32", kernel="torch", threads=1))
    defect(monkeypatch)
    certificate = certify(network, "fp_x", {})
    assert not certificate.passed
    assert any(probe.detail for probe in certificate.probes)
