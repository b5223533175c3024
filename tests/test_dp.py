"""DP-SGD and its masked form against per-sample gradients in memory and against Opacus: norms, sums, noise, epsilon."""

import copy
import math
import warnings

import pytest
import torch
from test_training import blobs, ids_of, network
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cwfast import MaskSet, select
from cwfast.defense import CWRF, DPSGD, ClippedGradients, PlainTraining, RelaxLoss
from cwfast.defense.accounting import epsilon_of, noise_for
from cwfast.defense.dp_steps import around_frozen, through_opacus
from cwfast.networks import vit
from cwfast.training import Recipe, Task

pytest.importorskip("opacus", reason="pip install opacus")
B = 6


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Tied(nn.Module):
    """One weight as embedding, as head and, cut, as a layer: two places that overlap."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 5))

    def forward(self, x):
        h = functional.embedding(x, self.weight)
        h = functional.linear(h, self.weight[:5]).tanh()
        return (h @ self.weight.t()).mean(dim=1)


class Checkpointed(nn.Module):
    """Two layers that run again in each backward pass."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(checkpoint(self.layers, x, use_reentrant=False).tanh())


class Last(nn.Module):
    """The last step of a recurrent layer, which has no rule of its own."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def tokens(*shape):
    return torch.randint(7, shape)


def image(channels, *size):
    return lambda: torch.randn(B, channels, *size)


POOL, MEAN = Apply(lambda x: x.flatten(2).mean(dim=2)), Apply(lambda x: x.mean(dim=1))
MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), lambda: torch.randn(B, 6)),
    "one step": (lambda: nn.Sequential(nn.Linear(6, 4), MEAN), lambda: torch.randn(B, 1, 6)),
    "few steps": (lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), MEAN), lambda: torch.randn(B, 3, 20)),
    "many steps": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), MEAN), lambda: torch.randn(B, 40, 4)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.Tanh(), POOL), image(4, 9)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.Tanh(), POOL), image(4, 7, 6)),
    "windows": (lambda: nn.Sequential(nn.Conv2d(3, 40, (3, 2)), nn.Tanh(), POOL), image(3, 5, 4)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 3, 2, bias=False), nn.Tanh(), POOL), image(4, 3, 3)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), MEAN), lambda: tokens(B, 5)),
    "padding": (lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=2), MEAN), lambda: tokens(B, 5)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm((5, 4)), Apply(torch.tanh), MEAN), lambda: torch.randn(B, 5, 4)),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(4), Apply(torch.tanh), MEAN), lambda: torch.randn(B, 5, 4)),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 4), Apply(torch.tanh), POOL), image(4, 3, 3)),
    "vit": (lambda: vit(8, 1, 3, patch=4, dim=8, depth=1, heads=2), image(1, 8, 8)),
    "checkpointed": (Checkpointed, lambda: torch.randn(B, 6)),
    "tied": (Tied, lambda: tokens(B, 4)),
    "loop": (Last, lambda: torch.randn(B, 3, 4)),
}
CASES = pytest.mark.parametrize("kind", MODELS)


def case(kind, dtype=torch.float64, rate=0.3):
    """A model, a batch, and masks that leave at least one parameter untouched and take some entries of the others."""
    torch.manual_seed(list(MODELS).index(kind))
    make, inputs = MODELS[kind]
    model, x = make().to(dtype), inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    masks = {name: torch.rand(p.shape) < rate for name, p in model.named_parameters()}
    if len(masks) > 1:
        masks[list(masks)[-1]][:] = False
    return model, x, torch.randint(3, (B,)), MaskSet.from_masks(masks)


def losses_of(model, x, y):
    return functional.cross_entropy(model(x), y, reduction="none")


def materialised(model, x, y, masks=None):
    """``{name: [B, *shape]}``, zero where frozen: one backward pass for each sample."""
    named = dict(model.named_parameters())
    each = [
        torch.autograd.grad(losses_of(model, x[i : i + 1], y[i : i + 1]).sum(), [*named.values()]) for i in range(B)
    ]
    found = {name: torch.stack(grads) for name, grads in zip(named, zip(*each, strict=True), strict=True)}
    if masks is not None:
        for name, g in found.items():
            g[:, masks[name]] = 0
    return found


def norms_of(gradients):
    return sum(g.double().flatten(1).square().sum(dim=1) for g in gradients.values()).sqrt()


@CASES
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_norms_and_clipped_sums_equal_materialised_ones(kind, masked):
    model, x, y, masks = case(kind)
    masks = masks if masked else None
    gradients = materialised(model, x, y, masks)
    norms = norms_of(gradients)
    clip = float(norms.median())  # some are clipped, others are not
    factors = (clip / (norms + 1e-6)).clamp(max=1)
    with ClippedGradients(model, max_grad_norm=clip, masks=masks) as clipped:
        found = clipped.backward(losses_of(model, x, y))
    torch.testing.assert_close(found, norms, rtol=1e-10, atol=0)
    for name, p in model.named_parameters():
        wanted = torch.einsum("b,b...->...", factors, gradients[name])
        torch.testing.assert_close(
            p.grad, wanted, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@CASES
def test_norms_of_float32_are_right_to_1e_5(kind):
    model, x, y, masks = case(kind, torch.float32)
    double = copy.deepcopy(model).double()
    wanted = norms_of(materialised(double, x.double() if x.is_floating_point() else x, y, masks))
    with ClippedGradients(model, masks=masks) as clipped:
        found = clipped.backward(losses_of(model, x, y))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["linear", "few steps", "many steps", "groups", "windows", "vit"])
def test_norms_stay_right_where_almost_all_of_them_is_frozen(kind):
    """The frozen entries are those with the largest gradients: a norm less their share would be lost in rounding."""
    model, x, y, _ = case(kind, torch.float32)
    exact = materialised(copy.deepcopy(model).double(), x.double(), y)
    sizes = torch.cat([g.abs().sum(dim=0).flatten() for g in exact.values()])
    limit = sizes.sort().values[len(sizes) // 50]
    masks = MaskSet.from_masks({name: g.abs().sum(dim=0) > limit for name, g in exact.items()})
    whole = norms_of(exact)
    for name, g in exact.items():
        g[:, masks[name]] = 0
    wanted = norms_of(exact)
    assert (wanted < 0.05 * whole).all()
    with ClippedGradients(model, masks=masks) as clipped:
        found = clipped.backward(losses_of(model, x, y))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["few steps", "groups", "tied"])
def test_one_sample_changes_the_clipped_sum_by_no_more_than_the_clipping_norm(kind):
    """What the noise is measured by, with a loss that is called with each sample alone."""
    model, x, y, masks = case(kind)
    clip = float(norms_of(materialised(model, x, y, masks)).min() / 2)

    def clipped_sum(x, y):
        model.zero_grad()
        with ClippedGradients(model, max_grad_norm=clip, masks=masks) as clipped:
            clipped.backward(losses_of(model, x, y))
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = clipped_sum(x, y)
    for i in range(B):
        others = torch.arange(B) != i
        change = (whole - clipped_sum(x[others], y[others])).norm()
        assert 0.999 * clip < change <= clip


def test_no_per_sample_gradient_is_in_memory():
    """Of a linear layer of 4 MB and 64 samples, 256 MB: no tensor of the two passes is larger than the weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in [result] if isinstance(result, torch.Tensor) else []:
                largest = max(largest, x.numel() if x.layout is torch.strided else x.values().numel())
            return result

    model = nn.Sequential(nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 3))
    masks = select({name: torch.rand(p.shape) for name, p in model.named_parameters()}, rate=0.05)
    with Watch(), ClippedGradients(model, masks=masks) as clipped:
        clipped.backward(losses_of(model, torch.randn(64, 1000), torch.randint(3, (64,))))
    assert largest == 1000 * 1000


@pytest.mark.parametrize("kind", ["linear", "few steps", "groups", "embedding", "layer norm", "rms norm", "group norm"])
def test_without_a_mask_clipped_sums_equal_those_of_opacus(kind):
    import opacus

    model, x, y, _ = case(kind, torch.float32)
    clip = float(norms_of(materialised(model, x, y)).median())
    theirs = copy.deepcopy(model)
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(theirs.parameters(), 1.0), noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=1
    )
    wrapped = opacus.GradSampleModule(theirs, loss_reduction="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' own hooks warn
        losses_of(wrapped, x, y).sum().backward()
    optimizer.pre_step()
    with ClippedGradients(model, max_grad_norm=clip) as clipped:
        clipped.backward(losses_of(model, x, y))
        clipped.add_noise_(0.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs.get_parameter(name).grad, rtol=1e-5, atol=1e-6)


def test_noise_is_zero_on_frozen_entries_and_has_its_spread_on_the_others():
    model = nn.Linear(300, 200)
    masks = MaskSet.from_masks({name: torch.rand(p.shape) < 0.3 for name, p in model.named_parameters()})
    clipped = ClippedGradients(model, max_grad_norm=0.7, masks=masks)
    clipped.add_noise_(1.3, torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        assert not p.grad[masks[name]].any()
        assert p.grad[~masks[name]].all()
    noise = model.weight.grad[~masks["weight"]].double() / (0.7 * 1.3)
    n = len(noise)
    assert abs(noise.mean()) < 4 / math.sqrt(n)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((noise.abs() < 1).double().mean() - math.erf(math.sqrt(0.5))) < 4 * math.sqrt(0.22 / n)


@pytest.mark.parametrize("name_of_optimizer", ["sgd", "adamw"])
def test_frozen_weights_stay_by_bits_and_get_no_state(name_of_optimizer):
    model, x, y, masks = case("linear", torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    optimizer = (
        torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1)
        if name_of_optimizer == "sgd"
        else torch.optim.AdamW(parameters, 0.1)
    )
    with around_frozen(model, optimizer, 1.0, 0.5, B, torch.Generator().manual_seed(0), masks) as step:
        for k in range(20):
            step(losses_of(model, x, y) if k % 5 else None)
    for name, p in model.named_parameters():
        assert torch.equal(p[masks[name]], before[name][masks[name]])
        assert (p != before[name])[~masks[name]].all()  # noise alone does that
        if name_of_optimizer == "adamw":  # SGD's momentum holds the weight decay
            assert not optimizer.state[p]["exp_avg"][masks[name]].any()


def test_an_empty_mask_trains_as_opacus_does_without_noise():
    task, ids, _ = small_task()
    private = DPSGD(noise_multiplier=0, delta=1e-3)
    start = task.initial_model(3)
    trained = PlainTraining().fit_many(task, ids[:1], task.dataset.reference, [3])
    nothing = MaskSet.from_masks({name: torch.zeros(p.shape, dtype=torch.bool) for name, p in start.named_parameters()})
    ours = private.fine_tune(task, [start], trained, ids[:1], [3], masks=[nothing], epochs=task.recipe.epochs)[0]
    theirs = private.fit_many(task, ids[:1], task.dataset.reference, [3])[0]
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert theirs.notes["privacy"].epsilon == math.inf


@pytest.mark.parametrize("step", [through_opacus, around_frozen])
def test_an_empty_draw_is_a_step_of_noise_alone(step):
    model, _, _, masks = case("linear", torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    extra = (masks,) if step is around_frozen else ()
    with step(model, optimizer, 1.0, 1.0, 4, torch.Generator().manual_seed(0), *extra) as take:
        take(None)
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]).detach()
    kept = torch.cat([~masks[name].flatten() for name in masks.names]) if extra else torch.ones(len(moved)).bool()
    assert moved[kept].all()
    assert 0.15 < moved[kept].std() < 0.35  # sigma C / 4


def small_task(**recipe):
    data = blobs()
    return Task(network, data, Recipe(**{"epochs": 6, "batch_size": 8} | recipe)), ids_of(2), [1, 2]


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_is_that_of_opacus_own_engine(accountant):
    """The engine's sampler, optimizer and accountant as Opacus documents them, for the same data and epochs."""
    import opacus

    task, ids, seeds = small_task()
    fitted = DPSGD(noise_multiplier=1.1, delta=1e-3, accountant=accountant).fit(task, ids[0], ids[1], seeds[0])
    privacy = fitted.notes["privacy"]
    members = torch.utils.data.TensorDataset(task.dataset.inputs[ids[0]], task.dataset.targets[ids[0]])
    loader = torch.utils.data.DataLoader(members, batch_size=8)
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = opacus.PrivacyEngine(accountant=accountant)
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            data_loader=loader,
            noise_multiplier=1.1,
            max_grad_norm=1.0,
        )
        for _ in range(6):
            for x, y in loader:
                optimizer.zero_grad()
                functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        assert privacy.epsilon == engine.get_epsilon(1e-3)
    assert privacy.steps == 6 * len(loader)
    assert privacy.covers == "model"


def test_a_target_epsilon_is_kept_and_nearly_used():
    task, ids, seeds = small_task()
    privacy = DPSGD(3.0, delta=1e-3, accountant="rdp").fit(task, ids[0], ids[1], seeds[0]).notes["privacy"]
    assert 2.98 < privacy.epsilon <= 3.0
    assert privacy.epsilon == epsilon_of(privacy.noise_multiplier, privacy.sample_rate, privacy.steps, 1e-3, "rdp")
    own = DPSGD(noise_multiplier=2, delta=1e-3, recipe=Recipe(epochs=2, batch_size=len(ids[0])))
    privacy = own.fit(task, ids[0], ids[1], seeds[0]).notes["privacy"]
    assert (privacy.steps, privacy.sample_rate) == (2, 1.0)
    assert 0 < privacy.epsilon < math.inf
    assert epsilon_of(1.0, 0.5, 0, 1e-3, "rdp") == 0
    assert noise_for(3.0, 0.5, 0, 1e-3, "rdp") == 0


def test_private_cwrf_keeps_rewound_weights_and_says_what_epsilon_covers():
    task, ids, seeds = small_task()
    defense = CWRF(0.2, loss=RelaxLoss(0.3), private=DPSGD(noise_multiplier=1.0, delta=1e-3, accountant="rdp"))
    for one in defense.fit_many(task, ids, task.dataset.reference, seeds):
        for name, p in one.model.named_parameters():
            assert torch.equal(p[one.masks[name]], one.initial[name][one.masks[name]])
        privacy = one.notes["privacy"]
        assert privacy.covers == "fine-tuning"
        assert "no guarantee for the released model" in str(privacy)
        assert privacy.steps == 3 * math.ceil(len(ids[0]) / 8)


def test_private_models_follow_from_their_seed_alone():
    task, ids, seeds = small_task()
    defense = CWRF(0.2, private=DPSGD(noise_multiplier=1.0, delta=1e-3, accountant="rdp"))
    trained = PlainTraining().fit_many(task, ids, task.dataset.reference, seeds)
    state = torch.get_rng_state()
    fleet = defense.fit_many(task, ids, task.dataset.reference, seeds, trained=trained)
    alone = defense.fit(task, ids[1], task.dataset.reference, seeds[1], trained=trained[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fleet[1].model[0].weight, alone.model[0].weight)
    assert not torch.equal(fleet[0].model[0].weight, fleet[1].model[0].weight)


def test_a_start_from_reference_samples_never_sees_the_members():
    """Until the private steps, nothing of the members is read: they may be anything."""
    task, ids, seeds = small_task()
    reference = task.dataset.reference
    defense = CWRF(0.2, private=DPSGD(noise_multiplier=1.0, delta=1e-3, accountant="rdp"), start="reference", epochs=0)
    found = defense.fit_many(task, ids, reference, seeds)
    assert {one.notes["privacy"].covers for one in found} == {"model"}
    other = copy.deepcopy(task.dataset)
    other.inputs[torch.cat(ids)] = torch.nan
    again = defense.fit_many(Task(network, other, task.recipe), ids, reference, seeds)
    assert all(a.masks == b.masks for a, b in zip(found, again, strict=True))
    assert all(torch.equal(a.model[0].weight, b.model[0].weight) for a, b in zip(found, again, strict=True))
    with pytest.raises(ValueError, match="no member may be a reference sample"):
        defense.fit_many(task, [reference, reference], reference, seeds)
    with pytest.raises(ValueError, match="trained must not be given"):
        defense.fit_many(task, ids, reference, seeds, trained=found)
    with pytest.raises(ValueError, match="start must be one of"):
        CWRF(0.2, start="anywhere")


def test_scores_of_a_start_from_reference_samples_are_those_it_selects_from():
    task, ids, seeds = small_task()
    reference = task.dataset.reference
    for criterion in ("taylor", "gap"):
        defense = CWRF(0.2, criterion=criterion, start="reference", epochs=0)
        half = [reference[: len(reference) // 2]] * 2
        trained = PlainTraining().fit_many(task, half, reference, seeds)
        scores = defense.score(task, ids, reference, seeds, trained)
        assert defense.masks(scores) == [one.masks for one in defense.fit_many(task, ids, reference, seeds)]
        other = copy.deepcopy(task.dataset)
        other.inputs[torch.cat(ids)] = torch.nan  # no member is looked at
        again = defense.score(Task(network, other, task.recipe), ids, reference, seeds, trained)
        for a, b in zip(scores, again, strict=True):
            assert all(torch.equal(score, b[name]) for name, score in a.items())
    with pytest.raises(ValueError, match="no member may be a reference sample"):
        defense.score(task, [reference, reference], reference, seeds, trained)


def normed():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.mark.parametrize("private", [lambda p: p, lambda p: CWRF(0.1, private=p)], ids=["scratch", "cwrf"])
def test_batchnorm_is_refused_before_training(private):
    task, ids, seeds = small_task()
    calls = []

    def make():
        model = normed()
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        return model

    with pytest.raises(ValueError, match=r"'1' is BatchNorm1d\. Use GroupNorm"):
        private(DPSGD(8, delta=1e-3)).fit_many(Task(make, task.dataset, task.recipe), ids, ids[0], seeds)
    assert not calls


def test_delta_must_mean_something():
    task, ids, seeds = small_task()
    with pytest.raises(ValueError, match=r"delta must be below 1 / n, 0\.0"):
        DPSGD(8, delta=0.5).fit_many(task, ids, ids[0], seeds)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one of epsilon and noise_multiplier"),
        ({"epsilon": 1, "noise_multiplier": 1}, "one of epsilon and noise_multiplier"),
        ({"epsilon": 0}, "epsilon must be positive"),
        ({"epsilon": 1, "delta": 0}, "delta must lie"),
        ({"epsilon": 1, "max_grad_norm": 0}, "max_grad_norm be positive"),
        ({"noise_multiplier": -1}, "noise_multiplier must be at least 0"),
        ({"epsilon": 1, "accountant": "gdp"}, "accountant must be one of"),
    ],
)
def test_dpsgd_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        DPSGD(**given)


def test_without_opacus_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install opacus"):
        DPSGD(8)


def test_losses_must_be_one_per_sample_of_one_call():
    model, x, y, masks = case("linear")
    with ClippedGradients(model, masks=masks) as clipped:
        with pytest.raises(ValueError, match="must have shape"):
            clipped.backward(losses_of(model, x, y).mean())
        with pytest.raises(ValueError, match="one call of the model"):
            clipped.backward(torch.cat([losses_of(model, x, y), losses_of(model, x, y)]))
    with pytest.raises(ValueError, match="max_grad_norm must be positive"):
        ClippedGradients(model, max_grad_norm=0)
