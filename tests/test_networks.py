"""The networks have the forms they are named for, train as one stack, and are scored, rewound and frozen."""

import pytest
import torch
from test_training import blobs, ids_of, plain_loop

from cwfast import networks
from cwfast.data import Dataset
from cwfast.defense import CWRF
from cwfast.training import Recipe, Task, cross_entropy, train_many

SMALL = {
    "mlp": lambda: networks.mlp(64, 3, width=12, depth=2),
    "cnn": lambda: networks.cnn(1, 3, width=4),
    "resnet18": lambda: networks.resnet18(1, 3, width=2),
    "vit": lambda: networks.vit(8, 1, 3, patch=4, dim=8, depth=2, heads=2),
}


def weights(model):
    return sum(p.numel() for p in model.parameters())


def test_resnet18_is_the_cifar_form():
    model = networks.resnet18()
    assert weights(model) == 11_173_962  # the count commonly given for it
    sizes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 20  # 17 and three shortcuts
    assert not any(isinstance(m, torch.nn.MaxPool2d) for m in model.modules())


def test_the_others_have_the_layers_they_were_asked_for():
    assert weights(networks.mlp(10, 3, width=5, depth=1)) == 10 * 5 + 5 + 5 * 3 + 3
    assert weights(networks.mlp(10, 3, depth=0)) == 33
    assert networks.mlp(12, 3)(torch.zeros(4, 3, 2, 2)).shape == (4, 3)
    assert networks.cnn(3, 7)(torch.zeros(4, 3, 9, 9)).shape == (4, 7)
    model = networks.vit(16, 3, 5, patch=4, dim=24, depth=3, heads=3)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    assert model.position.shape == (1, 16, 24)
    encoder = 4 * 24 * 24 + 4 * 24 + 8 * 24 * 24 + 5 * 24 + 4 * 24
    assert weights(model) == 48 * 24 + 24 + 16 * 24 + 3 * encoder + 2 * 24 + 24 * 5 + 5
    first, second = (block.attention.in_proj_weight for block in model.blocks[:2])
    assert not torch.equal(first, second)  # each block is drawn on its own
    for given in ({"size": 10}, {"dim": 10}):
        with pytest.raises(ValueError, match="must be a multiple"):
            networks.vit(**{"size": 8, "patch": 4, "dim": 12} | given)


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_a_fleet_of_them_trains_as_each_would_alone(make):
    data = blobs(features=64)
    data = Dataset(**{**vars(data), "inputs": data.inputs.double().view(-1, 1, 8, 8)})
    task, ids, seeds = Task(make, data, Recipe(lr=0.02, epochs=2, batch_size=8)), ids_of(2, n=20), [3, 4]
    fleet = [task.initial_model(seed).double() for seed in seeds]
    train_many(fleet, data, ids, seeds, task.recipe)  # a warning that they are not stacked would be an error
    for k, model in enumerate(fleet):
        alone = task.initial_model(seeds[k]).double()
        plain_loop(alone, data, ids[k], seeds[k], task.recipe, cross_entropy, 2)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:BatchNorm in training mode mixes")
@pytest.mark.parametrize("granularity", ["sample", "batch"])
@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_cwrf_defends_them(make, granularity):
    data = blobs(features=64)
    data = Dataset(**{**vars(data), "inputs": data.inputs.view(-1, 1, 8, 8)})
    task = Task(make, data, Recipe(lr=0.02, epochs=2, batch_size=8))
    for one in CWRF(0.1, granularity=granularity).fit_many(task, ids_of(2, n=20), data.reference, [3, 4]):
        assert one.masks.total == weights(one.model) // 10
        for name, p in one.model.named_parameters():
            assert torch.equal(p[one.masks[name]], one.initial[name][one.masks[name]])
        assert torch.isfinite(one.predict(data.inputs)).all()
