"""How many CPUs are really available: the affinity mask and the container's quota, not what the machine has."""

from __future__ import annotations

import os
from pathlib import Path

from gnomon.errors import UsageError


def available_threads() -> int:
    """GNOMON_THREADS, else the CPUs this process may use."""
    given = os.environ.get("GNOMON_THREADS")
    if given:
        if not given.isdigit() or int(given) < 1:
            raise UsageError(f"GNOMON_THREADS is `{given}`; give a whole number from 1.")
        return int(given)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return max(1, min(allowed, quota) if quota else allowed)


def _quota() -> int | None:
    """CPUs granted by the control group (v2), rounded up; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, -(-int(quota) // int(period)))
