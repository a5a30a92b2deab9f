"""Calls that may wait for a guard's scanners, on threads of their own.

The event loop's own few threads are for work that computes; a scanner that hangs would take them from everybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
MOST_WAITING = 256
_threads = ThreadPoolExecutor(MOST_WAITING, "gnomon-waiting")


async def beside(function: Callable[..., Result], *arguments: object) -> Result:
    """function(*arguments), without holding up the loop or what computes."""
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *arguments)
