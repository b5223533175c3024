"""Stacks of CNNs with BatchNorm and of small ViTs train as each model alone; what is not stacked, one by one."""

import copy

import pytest
import torch
from test_training import blobs, ids_of, network, plain_loop
from torch import nn

from cwfast import MaskSet
from cwfast.data import Dataset
from cwfast.defense.baselines import early_stopping_sweep
from cwfast.defense.cwrf import CWRF
from cwfast.training import Recipe, Task, cross_entropy, fit_from_scratch, train_many


class ViT(nn.Module):
    """Patches of a 6 x 6 image, two encoder layers, with torch's own attention."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 9, 8) * 0.02)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        patches = self.embed(x.view(-1, 1, 6, 6)).flatten(2).transpose(1, 2)
        return self.head(self.blocks(patches + self.position).mean(dim=1))


class Tied(nn.Module):
    """One matrix in two places, and a buffer that forward assigns anew."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(36, 36), nn.Linear(36, 36), nn.Linear(36, 3)
        self.b.weight = self.a.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.seen = self.seen + x.detach().double().sum()
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


def cnn(norm=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        norm(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        norm(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 3),
    )


def mlp():
    return nn.Sequential(nn.Linear(36, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 3))


MODELS = {
    "mlp": mlp,
    "cnn batchnorm": cnn,
    "cnn groupnorm": lambda: cnn(lambda channels: nn.GroupNorm(2, channels)),
    "cnn instancenorm": lambda: cnn(
        lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)
    ),
    "vit": ViT,
    "tied": Tied,
}
SEEDS = [5, 6, 7]


def images():
    data = blobs(features=36)
    return Dataset(**{**vars(data), "inputs": data.inputs.double()})


def task(make, **recipe):
    """10 epochs of 5 batches, the last of them smaller: 50 steps."""
    return Task(make, images(), Recipe(**{"lr": 0.05, "epochs": 10, "batch_size": 8, "weight_decay": 0.01} | recipe))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_fifty_steps_of_a_stack_are_those_of_each_model_alone(make, optimizer):
    job, ids = task(make, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 0.005), ids_of(3, n=38)
    fleet = [job.initial_model(seed).double().eval() for seed in SEEDS]
    train_many(fleet, job.dataset, ids, SEEDS, job.recipe)
    for k, model in enumerate(fleet):
        assert not any(module.training for module in model.modules())
        alone = job.initial_model(SEEDS[k]).double()
        start = copy.deepcopy(alone.state_dict())
        norms = any(isinstance(module, nn.InstanceNorm2d) for module in alone.modules())
        plain_loop(alone, job.dataset, ids[k], SEEDS[k], job.recipe, cross_entropy, job.recipe.epochs)
        expected = alone.state_dict()
        assert len(expected) == len(model.state_dict())
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)
            still = torch.equal(expected[name], start[name])  # InstanceNorm's count of batches stays 0
            assert torch.equal(value, start[name]) == still == (norms and name.endswith("num_batches_tracked")), name


def test_one_by_one_is_the_plain_loop_too():
    job, ids = task(cnn, stack=False), ids_of(2, n=38)
    fleet = [job.initial_model(seed).double() for seed in SEEDS[:2]]
    train_many(fleet, job.dataset, ids, SEEDS[:2], job.recipe)
    for k, model in enumerate(fleet):
        alone = job.initial_model(SEEDS[k]).double()
        plain_loop(alone, job.dataset, ids[k], SEEDS[k], job.recipe, cross_entropy, job.recipe.epochs)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_frozen_weights_of_a_stack_stay(make, stack):
    job = task(make, epochs=2, stack=stack)
    models = [job.initial_model(seed).double() for seed in SEEDS]
    before = [copy.deepcopy(dict(model.named_parameters())) for model in models]
    masks = [MaskSet.from_masks({name: torch.rand(p.shape) < 0.3 for name, p in m.named_parameters()}) for m in models]
    train_many(models, job.dataset, ids_of(3, n=38), SEEDS, job.recipe, masks=masks)
    for model, old, mask in zip(models, before, masks, strict=True):
        for name, parameter in model.named_parameters():
            same = parameter.detach() == old[name]
            assert same[mask[name]].all(), name
            assert (~same[~mask[name]]).any() or mask[name].all(), name


def test_models_with_dropout_are_trained_one_by_one_and_depend_on_their_seed_alone():
    job, ids = task(lambda: ViT(0.3).double(), epochs=3), ids_of(3)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="3 models are trained one by one, .* draws random numbers"):
        fleet = fit_from_scratch(job, ids, SEEDS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)  # neither this nor the company changes a model
    single = fit_from_scratch(job, ids[1:2], SEEDS[1:2])[0].model.state_dict()
    again = fit_from_scratch(
        Task(job.make_model, job.dataset, Recipe(**vars(job.recipe) | {"stack": False})), ids, SEEDS
    )
    for name, value in fleet[1].model.state_dict().items():
        assert torch.equal(value, single[name])
        assert torch.equal(value, again[1].model.state_dict()[name])
    without = fit_from_scratch(task(lambda: ViT(0.0).double(), epochs=3), ids, SEEDS)[1].model.state_dict()
    assert not torch.equal(without["head.weight"], single["head.weight"])  # dropout was on


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.1)), r"'1' \(Dropout\) draws random numbers"),
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.RReLU()), r"'1' \(RReLU\) draws random numbers"),
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, momentum=None)), r"'1' .* momentum=None"),
        (lambda: nn.Sequential(nn.RNN(6, 3), Last()), r"'0' \(RNN\) has no batched form"),
    ],
    ids=["dropout", "rrelu", "momentum", "rnn"],
)
def test_the_warning_names_the_module(make, reason):
    models = [make() for _ in range(2)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    with pytest.warns(UserWarning, match=reason):
        train_many(models, blobs(), ids_of(2), [0, 1], Recipe(epochs=1))
    for model, old in zip(models, before, strict=True):
        assert not torch.equal(model[0].state_dict().popitem()[1], old.popitem()[1])
    train_many(models[:1], blobs(), ids_of(1), [0], Recipe(epochs=1))  # one model is no stack: nothing to warn of
    train_many(models, blobs(), ids_of(2), [0, 1], Recipe(epochs=1, stack=False))


class Last(nn.Module):
    def forward(self, outputs):
        return outputs[0]


def test_dropout_of_nothing_is_stacked():
    models = [nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.0)) for _ in range(2)]
    train_many(models, blobs(), ids_of(2), [0, 1], Recipe(epochs=1))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


def test_what_vmap_cannot_run_says_how_to_train_it():
    models = [Branches() for _ in range(2)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    with pytest.raises(RuntimeError) as caught:
        train_many(models, blobs(), ids_of(2), [0, 1], Recipe(epochs=1))
    assert any("Recipe(stack=False)" in note for note in caught.value.__notes__)
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    train_many(models, blobs(), ids_of(2), [0, 1], Recipe(epochs=1, stack=False))


def test_early_stopping_keeps_the_statistics_of_that_epoch():
    make = lambda: cnn().double()  # noqa: E731
    job, ids = task(make, epochs=4, schedule="constant"), ids_of(2, n=38)
    final, stopped = early_stopping_sweep(job, ids, SEEDS[:2], [2])
    short = fit_from_scratch(task(make, epochs=2, schedule="constant"), ids, SEEDS[:2])
    for k in range(2):
        for name, value in short[k].model.state_dict().items():
            assert torch.equal(value, stopped[2][k].model.state_dict()[name]), name
    assert not torch.equal(final[0].model[2].running_mean, stopped[2][0].model[2].running_mean)


def test_an_interrupted_fleet_leaves_modes_and_frozen_weights():
    def stop(done, states):
        raise KeyboardInterrupt

    for stack in (True, False):
        models = [network().eval() for _ in range(2)]
        masks = [MaskSet.from_masks({"0.weight": torch.ones(8, 6, dtype=torch.bool)}) for _ in models]
        before = [model[0].weight.detach().clone() for model in models]
        with pytest.raises(KeyboardInterrupt):
            train_many(models, blobs(), ids_of(2), [0, 1], Recipe(stack=stack), masks=masks, on_epoch=stop)
        assert not any(model.training for model in models)
        assert all(torch.equal(model[0].weight, old) for model, old in zip(models, before, strict=True))


@pytest.mark.filterwarnings("ignore:BatchNorm in training mode mixes")
@pytest.mark.parametrize("criterion", ["taylor", "gap"])
@pytest.mark.parametrize("make", [cnn, ViT, Tied], ids=["cnn batchnorm", "vit", "tied"])
def test_shadows_of_such_models_are_trained_by_cwrf(make, criterion):
    job = Task(make, blobs(features=36), Recipe(lr=0.05, epochs=2, batch_size=8))
    fitted = CWRF(0.1, criterion=criterion).fit_many(job, ids_of(3, n=24), job.dataset.reference, SEEDS)
    for one in fitted:
        total = sum(parameter.numel() for parameter in one.model.parameters())
        assert one.masks.total == total // 10
        for name, parameter in one.model.named_parameters():
            mask = one.masks[name]
            assert torch.equal(parameter.detach()[mask], one.initial[name][mask])
        assert torch.isfinite(one.predict(job.dataset.inputs)).all()
