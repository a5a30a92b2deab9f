"""Ordered work on several threads, without nested threads inside torch's own operators."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")
_inside = threading.local()


def ordered_map(function: Callable[[A], B], items: Iterable[A], threads: int = 1) -> list[B]:
    """[function(item) for item in items] on up to `threads` threads; nested calls run where they are."""
    work = list(items)
    if threads <= 1 or len(work) <= 1 or getattr(_inside, "worker", False):
        return [function(item) for item in work]
    return list(_pool(threads).map(function, work))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Workers in which a torch operator uses one thread; the caller's own setting is put back."""
    before = torch.get_num_threads()
    barrier = threading.Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        _inside.worker = True

    pool = ThreadPoolExecutor(threads, thread_name_prefix="gnomon-merge", initializer=start)
    for _ in range(threads):  # a waiting task each, so that all workers exist
        pool.submit(barrier.wait)
    barrier.wait()
    torch.set_num_threads(before)
    return pool
