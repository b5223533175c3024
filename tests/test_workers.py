"""Pieces side by side: order, errors, how much is drawn ahead, and that kernels keep to their thread meanwhile."""

import threading
import time

import pytest
import torch

from cwfast import _backends
from cwfast._workers import ahead, alone, in_order
from cwfast.checkpoint.reader import Memory


def drawn_from(count, seen):
    for i in range(count):
        seen.append(i)
        yield i


def cwfast_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("cwfast")]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_and_few_wait(set_threads, threads):
    set_threads(threads)
    seen, found = [], []
    for result in in_order(lambda i: (time.sleep(0.001 * (i % 3)), 2 * i)[1], drawn_from(50, seen)):
        found.append(result)
        assert len(seen) <= len(found) + 2 * threads
    assert found == list(range(0, 100, 2))
    assert not cwfast_threads()


def test_an_error_of_a_worker_or_of_the_jobs_is_raised(set_threads):
    set_threads(2)

    def jobs():
        yield 3
        raise OSError("no more jobs")

    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda i: 1 / (i - 20), range(50)))
    with pytest.raises(OSError, match="no more jobs"):
        list(in_order(str, jobs()))
    results = in_order(str, range(50))
    assert next(results) == "0"
    results.close()
    assert not cwfast_threads()


def test_kernels_inside_start_no_threads(set_threads):
    set_threads(2)
    native = _backends.native()
    assert list(in_order(lambda _: native.threads(), range(4))) == [1] * 4
    with alone():
        assert native.threads() == 1
    with pytest.raises(OSError, match="inside"), alone():
        raise OSError("inside")
    assert native.threads() == torch.get_num_threads() == 2


@pytest.mark.parametrize("count", [1, 3])
def test_ahead_draws_so_many_and_one_more(count):
    seen = []
    items = ahead(drawn_from(20, seen), count)
    for i in range(20):
        assert next(items) == i
        time.sleep(0.01)
        assert len(seen) == min(i + 1 + count + 1, 20)
    assert list(items) == []
    assert not cwfast_threads()


def test_ahead_raises_what_is_raised_and_stops_where_no_one_draws():
    def broken():
        yield 1
        raise OSError("broken")

    items = ahead(broken(), 1)
    assert next(items) == 1
    with pytest.raises(OSError, match="broken"):
        next(items)
    seen = []
    items = ahead(drawn_from(1000, seen), 2)
    assert next(items) == 0
    items.close()
    assert not cwfast_threads()
    assert len(seen) < 10


def test_memory_takes_the_place_of_the_oldest():
    memory = Memory(2)
    first, second = (memory.take(8, torch.float32).fill_(i) for i in range(2))
    third = memory.take(16, torch.bfloat16)
    assert third.data_ptr() == first.data_ptr() != second.data_ptr()
    assert memory.take(100, torch.float64).shape == (100,)  # more than there was
    assert third.shape == (16,)
    assert torch.equal(memory.take(0, torch.int8), torch.empty(0, dtype=torch.int8))
