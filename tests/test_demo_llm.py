"""cwfast demo-llm at a tiny size: every row, resumed to the same report; what the report says follows from its rows."""

import json
import warnings

import numpy as np
import pytest
import torch

from cwfast import demo_llm
from cwfast.errors import CheckpointError
from cwfast.report import llm_defense, llm_reading

pytest.importorskip("transformers")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
import llm_models

pytestmark = [
    pytest.mark.usefixtures("without_torchvision"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
SIZES = demo_llm.Sizes(
    members=16, nonmembers=16, reference=16, heldout=8, lr=3e-3, batch=4, steps=2, steps_lr=1e-3, starts=(2,),
    criteria=tuple(demo_llm.CRITERIA), taus=(0.5, 0.15), tuned_taus=(0.3,), rewound_only=True, lora=(1e-2,), bootstrap=50,
    fprs=(0.1,),
)  # fmt: skip


def material(out, sizes):
    ids = llm_models.ids(56, 6, 12, seed=4)
    ends = np.cumsum([0, sizes.members, sizes.nonmembers, sizes.reference, sizes.heldout])
    names = ("members", "nonmembers", "reference", "heldout")
    sides = {name: ids[i:j] for name, i, j in zip(names, ends[:-1], ends[1:], strict=True)}
    return demo_llm.Material(llm_models.small("llama", torch.float32, tie_word_embeddings=True), sides, "random ids")


@pytest.fixture(scope="module")
def made(tmp_path_factory, without_torchvision):
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("demo")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft's, in set-up
        return out, demo_llm.run(out, sizes=SIZES, material=material, command="cwfast demo-llm <test>")


def test_it_runs(made):
    print(llm_defense.text(made[1]))
