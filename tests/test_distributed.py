"""Selection over ranks equals that of one process that has everything, bit for bit; token statistics to rounding."""

import itertools

import pytest
import ranks as work_of
import torch
import torch.distributed as dist


@pytest.mark.parametrize(
    ("work", "ranks"),
    [
        *itertools.product(["hostile", "options", "dtensors", "vocabulary"], [2, 3]),
        ("fsdp", 3),
        ("fsdp", 4),  # HSDP: two copies of two shards
        ("ddp", 2),
    ],
)
def test_ranks(tmp_path, monkeypatch, ranks, work):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(work_of.run, (ranks, str(tmp_path / "store"), work), nprocs=ranks)


def test_one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        work_of.hostile(0, 1)
    finally:
        dist.destroy_process_group()
