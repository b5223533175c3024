"""Scores of a language model's weights: the plain formulas in float64; the model stays as it was."""

import copy

import llm_models
import pytest
import torch

import cwfast
from cwfast.checkpoint import Checkpoint
from cwfast.llm import score_files, scoring

pytestmark = pytest.mark.usefixtures("without_torchvision")

KINDS = ["gpt2", "llama", "llama tied", "qwen3_moe", "gemma2"]
MEMBERS, REFERENCE = llm_models.ids(5, seed=1), llm_models.ids(4, seed=2)


def pair(kind: str, dtype=torch.float64):
    """A trained model and the one it comes from."""
    kind, _, tied = kind.partition(" ")
    more = {"tie_word_embeddings": True} if tied else {}
    initial = llm_models.small(kind, dtype, **more)
    model = copy.deepcopy(initial)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.05)
    return model, initial


def nll(model, text):
    """[T - 1]"""
    ids = torch.tensor(text)
    logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return -logp.gather(1, ids[1:, None])[:, 0]


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    return {
        n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, model.parameters(), found, strict=True)
    }


def plain_gap(model, initial, points):
    work = copy.deepcopy(model)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    start, end = dict(initial.named_parameters()), dict(model.named_parameters())
    for point in range(points):
        t = (point + 0.5) / points
        with torch.no_grad():
            for name, parameter in work.named_parameters():
                parameter.copy_(start[name] + t * (end[name] - start[name]))
        sides = [torch.cat([nll(work, text) for text in side]).mean() for side in (REFERENCE, MEMBERS)]
        for name, gradient in gradients(work, sides[0] - sides[1]).items():
            sums[name] += gradient / points
    return {name: ((end[name] - start[name]) * g).clamp(min=0).detach() for name, g in sums.items()}


def plain_taylor(model, initial, criterion, lam):
    start, weights = dict(initial.named_parameters()), dict(model.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in weights.items()}

    def kl(text):
        q, p = (m(torch.tensor(text)[None]).logits[0, :-1].log_softmax(-1) for m in (initial, model))
        return (q.detach().exp() * (q.detach() - p)).sum(-1)

    for side, weight, loss in ((MEMBERS, 1 - lam, lambda t: nll(model, t)), (REFERENCE, lam, kl)):
        for text in side:
            for name, gradient in gradients(model, loss(text).mean()).items():
                sums[name] += weight / len(side) * gradient.abs()
    factor = {n: w - start[n] if criterion == "taylor_delta" else w for n, w in weights.items()}
    return {name: (total * factor[name].abs()).detach() for name, total in sums.items()}


def assert_close(found, expected, kind):
    tolerance = 1e-9 if kind == "gpt2" else 1e-5  # the norms of the others compute in float32 whatever the weights are
    assert list(found) == list(expected)
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert float((found[name].double() - value).abs().max()) <= tolerance * max(scale, 1e-12), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("points", [1, 3])
def test_gap_is_the_plain_formula(kind, points):
    model, initial = pair(kind)
    found = scoring.score(model, initial, MEMBERS, REFERENCE, points=points, batch_size=2)
    assert_close(found, plain_gap(model, initial, points), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("criterion", "lam"), [("taylor", 0.5), ("taylor_delta", 0.25)])
def test_taylor_is_the_plain_formula(kind, criterion, lam):
    model, initial = pair(kind)
    found = scoring.score(model, initial, MEMBERS, REFERENCE, criterion=criterion, lam=lam, batch_size=2)
    assert_close(found, plain_taylor(model, initial, criterion, lam), kind)


# -- folders


def save(folder, model, shard="8KB"):
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture
def folders(tmp_path):
    """A function: kind -> folders of the trained model and of its base, in several shards."""

    def make(kind, dtype=torch.float32):
        model, initial = pair(kind, dtype)
        return save(tmp_path / "model", model), save(tmp_path / "base", initial)

    return make


def loaded(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama tied", "qwen3_moe"])
@pytest.mark.parametrize("criterion", ["gap", "taylor_delta"])
def test_a_folder_gets_the_scores_of_memory_in_any_number_of_passes(folders, tmp_path, kind, criterion):
    model, base = folders(kind)
    in_memory = loaded(model)
    expected = scoring.score(in_memory, loaded(base), MEMBERS, REFERENCE, criterion=criterion)
    expected = score_files.on_disk(in_memory, expected)
    for i, per_pass in enumerate((None, 1000)):
        out = tmp_path / f"scores{i}"
        done = scoring.score_folder(model, base, MEMBERS, REFERENCE, out, criterion=criterion, params_per_pass=per_pass)
        found = Checkpoint(out)
        assert set(found.entries) == set(expected) == set(done["tensors"])
        for name, scores in expected.items():
            assert torch.equal(found.tensor(name), scores), name
            assert found.entry(name).file.name == Checkpoint(model).entry(name).file.name
        order = {name: expected[name] for name in found.entries}
        assert cwfast.select(out, rate=0.01) == cwfast.select(order, rate=0.01)
