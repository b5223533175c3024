"""Every block of docs/recipes.md runs, and does what the page says of it."""

import pytest
import snippets
import torch

PAGE = "recipes.md"
RECIPES = dict.fromkeys(name for _, name, _ in snippets.blocks(PAGE) if name)


def run(recipe):
    return snippets.run(PAGE, recipe)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_section_has_a_recipe_and_every_recipe_a_test():
    assert list(RECIPES) == ["salun", "tickets", "fish", "accelerate", "trainer", "average"]
    for name in RECIPES:
        assert f"test_{name}" in globals()


def test_salun():
    found = run("salun")
    masks, optimizer = found["masks"], found["optimizer"]
    assert masks.total == sum(p.numel() for p in found["model"].parameters()) // 10
    assert sum(len(state["exp_avg"]) for state in optimizer.state.values()) == masks.total


def test_tickets():
    found = run("tickets")
    model, dead, early = found["model"], found["dead"], found["early"]
    assert dead.total == round(0.8 * dead.numel)
    for name in dead.names:
        weight = model.get_parameter(name)
        assert not weight[dead[name]].any()
        assert (weight != early[name])[~dead[name]].any()  # the others have trained on from there


def test_fish(tmp_path):
    found = run("fish")
    assert found["masks"].total == 1348 * 5 // 1000
    assert (tmp_path / "fish.safetensors").exists()


def test_accelerate():
    pytest.importorskip("accelerate")
    assert_trained(run("accelerate"))


@pytest.mark.usefixtures("without_torchvision")
def test_trainer():
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    try:
        assert transformers.Trainer
    except ImportError as error:  # it imports lazily, and much: torchvision of another torch is enough to break it
        pytest.skip(f"transformers.Trainer cannot be imported: {error}")
    assert_trained(run("trainer"))


def assert_trained(found):
    assert any(
        not torch.equal(p, q) for p, q in zip(found["model"].parameters(), found["before"].parameters(), strict=True)
    )


def test_average():
    found = run("average")
    for name, p in found["model"].named_parameters():
        mask = found["masks"][name]
        assert torch.equal(p[mask], found["average"].module.get_parameter(name)[mask])
        assert not torch.equal(p[~mask], found["average"].module.get_parameter(name)[~mask])
