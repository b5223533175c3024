"""Pieces worked on side by side, each by a thread of its own, and kernels that start no threads meanwhile.

Where reading, hashing and writing keep the processors busy, OpenMP's threads only get in their way: after each parallel
region they wait by spinning.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from cwfast import _backends

Job = TypeVar("Job")
Result = TypeVar("Result")
Item = TypeVar("Item")


@contextmanager
def alone() -> Iterator[None]:
    """Inside, kernels that this thread calls use no other thread."""
    native = _backends.extension()
    if isinstance(native, str):
        yield
        return
    before = native.threads()
    native.set_threads(1)
    try:
        yield
    finally:
        native.set_threads(before)


def in_order(work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """``work(job)`` of each job, in their order, by as many threads as torch uses; few results wait at a time."""
    threads = torch.get_num_threads()

    def one(job: Job) -> Result:
        with alone():
            return work(job)

    with ThreadPoolExecutor(threads, "cwfast-worker") as pool:
        waiting: deque[Future[Result]] = deque()
        for job in jobs:
            waiting.append(pool.submit(one, job))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, drawn by a thread of its own: ``count`` of them may wait while one more is drawn."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, "cwfast-ahead") as pool:
        waiting = deque(pool.submit(next, source, end) for _ in range(count + 1))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, source, end))
            yield item  # type: ignore[misc]
