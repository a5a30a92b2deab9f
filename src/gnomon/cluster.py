"""Ray, where the extra `cluster` is installed: imported, and started or joined. Knows nothing of what runs on it."""

from __future__ import annotations

import os
from typing import Any

from gnomon.errors import MissingExtra, NotReady


def import_ray(what: str) -> Any:
    """The module. what: who needs it. Raises MissingExtra."""
    try:
        import ray
    except ImportError:
        raise MissingExtra(what, "cluster") from None
    return ray


def start_ray(ray: Any, address: str | None, *, hint: str, **own: Any) -> bool:
    """Join the cluster at an address ("auto" finds it), or start one here (None), unless this process is in one.

    own: settings of a cluster that is started here. -> whether it is ours to shut down. Raises NotReady.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported anywhere
    settings = {} if address else {"include_dashboard": False, **own}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **settings)
    except Exception as error:
        raise NotReady(f"Ray did not start: {' '.join(str(error).split())[:200]}", hint=hint) from None
    return True
