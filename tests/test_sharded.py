"""A model that FSDP2 shards over gloo ranks is scored, selected, rewound and frozen as one process does it."""

import pytest
import sharded
import torch


@pytest.mark.parametrize(
    ("ranks", "works"),
    [
        (2, ["scores", "selection", "files", "rewind", "freezing", "variants", "layers", "gap", "refusals", "ddp"]),
        (2, ["tensor_parallel"]),
        (3, ["selection", "freezing", "variants", "tensor_parallel"]),
        pytest.param(3, ["scores", "files", "rewind", "layers", "gap", "refusals", "ddp"], marks=pytest.mark.slow),
        pytest.param(
            4, ["scores", "selection", "files", "rewind", "freezing", "gap", "refusals"], marks=pytest.mark.slow
        ),
    ],
    ids=["2", "2, tensor parallelism", "3", "3, the rest", "4: two copies of two shards"],
)
def test_ranks(tmp_path, monkeypatch, ranks, works):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FOLDER", str(tmp_path))
    torch.multiprocessing.spawn(sharded.run, (ranks, str(tmp_path / "store"), works), nprocs=ranks)
