"""Pieces worked on side by side, each by a thread of its own, and kernels that start no threads meanwhile.

Where reading, hashing and writing keep the processors busy, OpenMP's threads only get in their way: after each parallel
region they wait by spinning.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
    """The items, drawn by a thread of its own that is at most ``count`` of them ahead."""
    waiting: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue(count)
    stopped = threading.Event()

    def work() -> None:
        try:
            for item in items:
                waiting.put((item,))
                if stopped.is_set():
                    return
            waiting.put(None)
        except BaseException as error:
            waiting.put(error)

    thread = threading.Thread(target=work, name="cwfast-ahead")
    thread.start()
    try:
        while (found := waiting.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found[0]
    finally:
        stopped.set()
        while thread.is_alive():
            with suppress(queue.Empty):  # it may wait for room
                waiting.get(timeout=0.01)
        thread.join()
