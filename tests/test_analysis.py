"""Measures of scores and critical weights against plain versions; the paper's tables at tiny sizes."""

import copy
import json
import math

import pytest
import torch
from test_defense import trained_pair
from test_training import blobs, ids_of, network
from torch import nn
from torch.nn import functional

from cwfast import MaskSet, networks, select
from cwfast.data import Dataset
from cwfast.defense import CWRF, PlainTraining, RelaxLoss
from cwfast.defense.analysis import by_layer, concentration, correlation, kinds, learnability, overlap
from cwfast.defense.experiments import ablation, architectures, entanglement, onion
from cwfast.report import study_tables
from cwfast.report.paper import SMALL, ablation_notes, entanglement_notes
from cwfast.training import Recipe, Task


def test_kinds_of_every_parameter():
    model = nn.ModuleDict({"vit": networks.vit(8, 1, patch=4, dim=8, depth=1, heads=2), "embed": nn.Embedding(3, 2)})
    found = kinds(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert found["vit.embed.weight"] == "conv"
    assert found["vit.position"] == "other"
    assert found["vit.blocks.0.norm1.weight"] == found["vit.norm.bias"] == "norm"
    assert (
        found["vit.blocks.0.attention.in_proj_weight"] == found["vit.blocks.0.attention.out_proj.bias"] == "attention"
    )
    assert found["vit.blocks.0.mlp.0.weight"] == found["vit.head.weight"] == "linear"
    assert found["embed.weight"] == "embedding"
    assert set(kinds(networks.resnet18(1, width=2)).values()) == {"conv", "norm", "linear"}
    model["embed"].weight.requires_grad_(False)
    assert "embed.weight" not in kinds(model)


def test_correlation_is_pearsons_by_group_and_over_all():
    generator = torch.Generator().manual_seed(0)
    a = {name: torch.rand(shape, generator=generator) for name, shape in (("x", (3, 4)), ("y", (5,)), ("z", (7,)))}
    b = {name: score + torch.rand(score.shape, generator=generator) for name, score in a.items()}
    b["z"] = torch.ones(7)  # constant
    found = correlation(a, b, {"x": "one", "y": "one", "z": "two"})

    def plain(names):
        pair = [torch.cat([side[name].double().flatten() for name in names]) for side in (a, b)]
        return float(torch.corrcoef(torch.stack(pair))[0, 1])

    assert found["one"]["pearson"] == pytest.approx(plain(["x", "y"]), rel=1e-12)
    assert found["all"]["pearson"] == pytest.approx(plain(["x", "y", "z"]), rel=1e-12)
    assert found["two"]["pearson"] is None
    assert [found[group]["weights"] for group in found] == [17, 7, 24]
    assert found["one"]["share"] == 17 / 24
    with pytest.raises(ValueError, match="same names"):
        correlation(a, b, {"x": "one"})
    with pytest.raises(ValueError, match="'y' has"):
        correlation(a, b | {"y": torch.ones(4)}, dict.fromkeys(a, "one"))


def test_concentration_of_plain_and_signed_scores():
    scores = {"a": torch.arange(1.0, 101), "b": torch.zeros(900)}
    assert concentration(scores) == [{"top": 0.001, "share": 100 / 5050}, {"top": 0.01, "share": 955 / 5050}]
    signed = {"a": torch.tensor([4.0, -3, 2, -1, 0, 0, 0, 0, 0, 0])}
    assert concentration(signed, tops=(0.1, 0.2)) == [{"top": 0.1, "share": 2.0}, {"top": 0.2, "share": 3.0}]
    assert concentration({"a": torch.zeros(10)}, tops=(0.0,)) == [{"top": 0.0, "share": 0.0}]


def test_by_layer_counts_and_measures_movement():
    model, initial, _, _ = trained_pair()
    masks = select({name: (p.detach() - 1).abs() for name, p in model.named_parameters()}, rate=0.3)
    rows = by_layer(model, initial, masks)
    assert [row["layer"] for row in rows] == ["0", "2", "all"]
    for row in rows:
        names = [n for n in masks.names if row["layer"] in (n.partition(".")[0], "all")]
        distances = [(model.get_parameter(n) - initial.get_parameter(n)).detach().abs().flatten() for n in names]
        moved = torch.cat(distances)
        mask = torch.cat([masks[n].flatten() for n in names])
        assert (row["critical"], row["weights"]) == (int(mask.sum()), len(mask))
        assert row["moved_critical"] == pytest.approx(float(moved[mask].mean()), rel=1e-12)
        assert row["moved_rest"] == pytest.approx(float(moved[~mask].mean()), rel=1e-12)
        size = torch.cat([initial.get_parameter(n).detach().abs().flatten() for n in names])
        assert row["size_critical"] == pytest.approx(float(size[mask].mean()), rel=1e-12)
        assert row["size_rest"] == pytest.approx(float(size[~mask].mean()), rel=1e-12)
    nothing = select({name: torch.zeros_like(p) for name, p in model.named_parameters()}, rate=0)
    assert by_layer(model, initial, nothing)[-1]["moved_critical"] is None


def test_overlap_and_what_chance_gives():
    generator = torch.Generator().manual_seed(0)
    a, b = (MaskSet.from_masks({"w": torch.rand(200_000, generator=generator) < share}) for share in (0.1, 0.3))
    found = overlap({"a": a, "b": b, "again": a})
    assert found["names"] == ["a", "b", "again"]
    assert found["jaccard"][0][1] == found["jaccard"][1][0] == a.jaccard(b)
    assert found["jaccard"][0][2] == 1
    assert found["by_chance"][0][1] == pytest.approx(a.jaccard(b), rel=0.02)  # independent draws


def learned_by_hand(task, ids, seed, by_sample):
    """Plain training, with the sum of |g w| kept along the way."""
    model, generator = task.initial_model(seed), torch.Generator().manual_seed(seed)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    recipe = task.recipe
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, momentum=recipe.momentum)
    steps = recipe.epochs * -(-len(ids) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(recipe.epochs):
        for batch in ids[torch.randperm(len(ids), generator=generator)].split(recipe.batch_size):
            parts = [batch[i : i + 1] for i in range(len(batch))] if by_sample else [batch]
            for part in parts:
                loss = functional.cross_entropy(model(task.dataset.inputs[part]), task.dataset.targets[part])
                grads = torch.autograd.grad(loss, list(model.parameters()))
                for (name, p), g in zip(model.named_parameters(), grads, strict=True):
                    total[name] += (g * p.detach()).abs()
            optimizer.zero_grad()
            functional.cross_entropy(model(task.dataset.inputs[batch]), task.dataset.targets[batch]).backward()
            optimizer.step()
            schedule.step()
    return model, total


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_learnability_is_the_sum_over_training(granularity):
    data = blobs()
    data = Dataset(**{**vars(data), "inputs": data.inputs.double()})
    task = Task(lambda: network().double(), data, Recipe(epochs=3, batch_size=8))
    fitted, found = learnability(task, ids_of(1)[0], 4, granularity=granularity)
    model, expected = learned_by_hand(task, ids_of(1)[0], 4, granularity == "sample")
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(fitted.model.get_parameter(name), model.get_parameter(name), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(fitted.initial[n], p) for n, p in task.initial_model(4).named_parameters())
    plain = PlainTraining().fit(task, ids_of(1)[0], data.reference, 4)
    torch.testing.assert_close(fitted.model[0].weight, plain.model[0].weight, rtol=1e-9, atol=1e-12)


def images(n=90, size=8):
    data = blobs(n=n, features=size * size)
    return Dataset(**{**vars(data), "inputs": 0.3 * data.inputs})


def test_the_tables_for_three_networks_at_tiny_sizes():
    data, ids, seeds = images(), ids_of(2, n=24), [1, 2]
    tasks = architectures(data, epochs=1, width=2)
    entangled, ablated = {}, {}
    for name, task in tasks.items():
        entangled[name] = entanglement(task, ids, data.reference, seeds, rate=0.02)
        ablated[name] = ablation(
            task, ids, data.reference, seeds, loss=RelaxLoss(0.5), measure=lambda fitted: {"x": 1.0}
        )
    assert json.loads(json.dumps([entangled, ablated], allow_nan=False)) == [entangled, ablated]
    for name, found in entangled.items():
        numel = sum(p.numel() for p in tasks[name].make_model().parameters())
        assert numel == found["weights"] == found["correlation"]["all"]["weights"]
        assert found["layers"][-1]["critical"] == math.floor(0.02 * numel)
        assert sum(row["critical"] for row in found["layers"][:-1]) == pytest.approx(found["layers"][-1]["critical"])
        assert all(-1 <= value <= 1 for group in found["correlation"].values() for value in group["pearson"] if value)
        assert len(found["correlation"]["all"]["pearson"]) == 2
        assert found["overlap"]["names"][0] == "taylor"
        assert found["concentration"]["random"][1]["mean"] == pytest.approx(0.02, rel=0.1)  # 0.01 * (2 - 0.01)
    assert set(entangled["ViT"]["correlation"]) == {"conv", "attention", "linear", "norm", "other", "all"}
    for found in ablated.values():
        assert [row["id"] for row in found["rows"]] == [
            "undefended", "scratch", "tuned", "rewound", "A1", "A2", "A3", "random",
        ]  # fmt: skip
        assert all(math.isfinite(row[k]) for row in found["rows"] for k in ("train_loss", "test_loss_std", "x"))
    notes = entanglement_notes(entangled)
    assert notes[0] == SMALL
    assert "ResNet18 conv 0.941," in notes[1]
    norm = entangled["ResNet18"]["correlation"]["norm"]["mean"]
    others = [entangled["ResNet18"]["correlation"][group]["mean"] for group in ("conv", "linear")]
    assert (f"ResNet18 norm ({norm:.3f})" in notes[2]) == (norm < min(others))
    whole = entangled["MLP"]["layers"][-1]
    times = whole["moved_critical"] / whole["moved_rest"]
    relative = times * whole["size_rest"] / whole["size_critical"]
    assert f": MLP {times:.1f} ({relative:.1f}), ResNet18 " in notes[4]
    notes = ablation_notes(ablated)
    assert "0.50 for A2, 0.36 for A3." in notes[1]
    rows = {row["id"]: row for row in ablated["ViT"]["rows"]}
    gap = {key: row["test_loss"] - row["train_loss"] for key, row in rows.items()}
    assert f"{gap['A2']:.3f} for A2, {gap['A3']:.3f} for A3" in notes[4]
    assert (gap["A3"] < gap["A2"]) == ("A3's is below A2's" in notes[4])
    part = {
        "rows": [],
        "tables": [{"network": name, **one} for found in (entangled, ablated) for name, one in found.items()],
    }
    assert study_tables.notes(part) == [" ".join(notes), " ".join(entanglement_notes(entangled))]


def test_the_ablation_does_what_its_rows_say():
    data, ids, seeds = blobs(), ids_of(2), [1, 2]
    task = Task(network, data, Recipe(epochs=6, batch_size=8))
    trained = PlainTraining().fit_many(task, ids, data.reference, seeds)
    seen = []
    found = ablation(
        task, ids, data.reference, seeds, loss=RelaxLoss(0.3), rate=0.2, trained=trained,
        measure=lambda fitted: seen.append(list(fitted)) or {},
    )  # fmt: skip
    rows = dict(zip([row["id"] for row in found["rows"]], seen, strict=True))
    scores = CWRF(0.2, granularity="batch").score(task, ids, data.reference, seeds, trained)
    masks = CWRF(0.2).masks(scores)
    for k, mask in enumerate(masks):
        start, old = trained[k].initial, trained[k].model
        for name in mask.names:
            value = {key: fleet[k].model.get_parameter(name).detach() for key, fleet in rows.items()}
            m = mask[name]
            assert torch.equal(value["undefended"], old.get_parameter(name))
            assert torch.equal(value["rewound"][~m], old.get_parameter(name)[~m])
            assert torch.equal(value["rewound"][m], start[name][m])
            assert (value["A1"][m] == 0).all()
            assert torch.equal(value["A2"][~m], old.get_parameter(name)[~m])
            assert torch.equal(value["A3"][m], start[name][m])
        assert rows["random"][k].masks.counts == mask.counts
        assert rows["random"][k].masks == mask.random_like(seeds[k])
    logits = torch.stack([one.predict(data.inputs[data.test]) for one in trained])
    losses = [float(functional.cross_entropy(one, data.targets[data.test])) for one in logits]
    assert found["rows"][0]["test_loss"] == pytest.approx(sum(losses) / 2)


def test_architectures_take_square_images_only():
    data = blobs(features=36)
    with pytest.raises(ValueError, match=r"multiple of 4; got shape \(90, 36\)"):
        architectures(data)
    with pytest.raises(ValueError, match="square images"):
        architectures(Dataset(**{**vars(data), "inputs": torch.zeros(90, 1, 8, 4)}))


def test_the_onion_peels_layer_by_layer():
    model, initial, members, reference = trained_pair(dtype=torch.float32)
    before = copy.deepcopy(model)
    options = {"rate": 0.1, "lr": 0.05, "update": False}
    found = onion(model, initial, members, reference, layers=3, epochs=1, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    first, second, third = found["layers"]
    assert (first["jaccard_previous"], first["jaccard_all"], first["mass_rewound"]) == (None, None, 0.0)
    k = math.floor(0.1 * sum(p.numel() for p in model.parameters()))
    assert first["frozen"] == k
    shared = 2 * k - second["frozen"]
    assert second["jaccard_previous"] == second["jaccard_all"] == pytest.approx(shared / (2 * k - shared))
    assert second["frozen"] <= third["frozen"] <= 3 * k
    assert all(0 < row["mass"] < 1 and row["loss"] > 0 for row in found["layers"])
    assert second["mass_rewound"] > 0  # |g w| of a rewound weight need not be small
    alone = onion(model, initial, members, reference, layers=2, criterion="delta", rate=0.1)
    assert alone["layers"][1]["jaccard_all"] == 0  # they are where they began
    assert alone["layers"][1]["mass_rewound"] == 0
    assert alone["layers"][1]["loss"] is None
