"""Scores of a language model's weights: the plain formulas in float64; the model stays as it was."""

import copy
import json

import llm_models
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cwfast
from cwfast import MaskSet
from cwfast.checkpoint import Checkpoint
from cwfast.checkpoint.identity import SCORES
from cwfast.cli import main
from cwfast.errors import CheckpointError
from cwfast.layers import heads
from cwfast.llm import score_files, scoring
from cwfast.llm.estimating import Estimator
from cwfast.llm.folders import rewind_folder

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


def test_batches_and_containers_change_rounding_only():
    model, initial = pair("gpt2")
    members = [torch.tensor(row) for row in MEMBERS]
    for criterion in ("gap", "taylor"):
        one = scoring.score(model, initial, members, REFERENCE, criterion=criterion, batch_size=1)
        all_at_once = scoring.score(model, initial.state_dict(), MEMBERS, REFERENCE, criterion=criterion, batch_size=9)
        assert_close(one, all_at_once, "gpt2")


def test_only_some_parameters():
    model, initial = pair("llama")
    every = scoring.score(model, initial, MEMBERS, REFERENCE)
    some = scoring.score(model, initial, MEMBERS, REFERENCE, only=["*.mlp.*", "lm_head*"])
    assert set(some) == {name for name in every if ".mlp." in name or "lm_head" in name}
    assert all(torch.equal(some[name], every[name]) for name in some), "bit for bit: the path moves all weights"


def test_batch_granularity_is_the_papers_sum_over_steps():
    model, initial = pair("gpt2")
    options = {"criterion": "taylor_delta", "granularity": "batch", "batch_size": 3, "lam": 0.25}
    found = scoring.score(model, initial, MEMBERS, REFERENCE[:1], **options)
    start, weights = dict(initial.named_parameters()), dict(model.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in weights.items()}
    order = sorted(MEMBERS, key=lambda row: -len(row))
    text = torch.tensor(REFERENCE[0])
    q, p = (m(text[None]).logits[0, :-1].log_softmax(-1) for m in (initial, model))
    kl = (q.detach().exp() * (q.detach() - p)).sum(-1).mean()
    pulled = gradients(model, kl)
    for batch in (order[:3], order[3:]):
        pushed = gradients(model, torch.stack([nll(model, row).mean() for row in batch]).mean())
        for name, weight in weights.items():
            both = 0.75 * pushed[name] + 0.25 * pulled[name]
            expected[name] += (both * (weight - start[name])).abs().detach()
    assert_close(found, expected, "gpt2")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("criterion", ["gap", "taylor_delta"])
def test_an_adapters_own_weights(criterion):
    """Scored are the parameters that require a gradient; the others are the same at both ends of the path."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "down_proj"]
    model = peft.get_peft_model(llm_models.small("llama"), peft.LoraConfig(r=2, target_modules=targets)).double()
    initial = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    found = scoring.score(model, initial, MEMBERS, REFERENCE, criterion=criterion)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 8
    assert all("lora_" in name for name in names)
    for each in (model, initial):
        for parameter in each.parameters():
            parameter.requires_grad_(True)
    plain = plain_gap(model, initial, 1) if criterion == "gap" else plain_taylor(model, initial, criterion, 0.5)
    assert_close(found, {name: plain[name] for name in names}, "llama")


def test_a_tied_weight_may_have_another_name_in_initial():
    model, initial = pair("gpt2")
    state = initial.state_dict()
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    assert_close(scoring.score(model, state, MEMBERS, REFERENCE), plain_gap(model, initial, 1), "gpt2")


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
@pytest.mark.parametrize("criterion", ["gap", "taylor", "taylor_delta"])
@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"autocast": torch.bfloat16}], ids=["weights", "auto"])
def test_bfloat16_is_near_and_sums_in_float32(kind, criterion, options):
    model, initial = pair(kind, options.get("dtype", torch.float32))
    autocast = options.get("autocast")
    found = scoring.score(model, initial, MEMBERS, REFERENCE, criterion=criterion, autocast=autocast)
    model, initial = model.double(), initial.double()
    plain = plain_gap(model, initial, 1) if criterion == "gap" else plain_taylor(model, initial, criterion, 0.5)
    assert all(scores.dtype == torch.float32 for scores in found.values())
    flat, plain_flat = (torch.cat([x[name].double().flatten() for name in plain]) for x in (found, plain))
    assert float((flat - plain_flat).norm()) <= 0.2 * float(plain_flat.norm())


@pytest.mark.parametrize("criterion", ["gap", "taylor"])
def test_many_batches_of_bfloat16_gradients_are_summed_in_float32(criterion):
    model, initial = pair("gpt2", torch.bfloat16)
    members, reference = [MEMBERS[0]] * 32, [REFERENCE[0]] * 32  # a power of 2: losses are weighted exactly
    once = scoring.score(model, initial, members[:1], reference[:1], criterion=criterion, batch_size=1)
    often = scoring.score(model, initial, members, reference, criterion=criterion, batch_size=1)
    for name, value in once.items():
        assert float((often[name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-30, name


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that an operation outside of the kernels makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *made])
        return result


@pytest.mark.parametrize("criterion", ["gap", "taylor", "taylor_delta"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])  # tied to the embedding, and not
def test_logits_never_exist(monkeypatch, kind, criterion):
    monkeypatch.setattr(heads, "TILE", 1 << 16)
    vocabulary = 5000
    model = llm_models.small(kind, torch.float32)
    model.resize_token_embeddings(vocabulary)
    texts = [torch.randint(vocabulary, (50,)).tolist() for _ in range(16)]
    with Largest() as largest:
        scoring.score(model, copy.deepcopy(model), texts[:8], texts[8:], criterion=criterion)
    assert largest.numel <= vocabulary * 16 < 8 * 49 * vocabulary, "the head's weight, not its logits"


# -- the model afterwards


def state_of(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: (id(t), t.detach().clone()) for name, t in tensors.items()},
        "flags": {name: (p.requires_grad, p.grad is None, type(p)) for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "seed": torch.get_rng_state(),
    }


def assert_same(before, after):
    for name, (kept, value) in before["tensors"].items():
        assert after["tensors"][name][0] == kept, name
        assert torch.equal(after["tensors"][name][1], value), name
    assert torch.equal(before["seed"], after["seed"])
    assert all(before[key] == after[key] for key in ("flags", "modes", "hooks"))


class Stop(Exception):
    pass


@pytest.mark.parametrize("criterion", ["gap", "taylor_delta"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
@pytest.mark.parametrize("stop", [None, 3])
def test_the_model_is_what_it_was(monkeypatch, criterion, kind, stop):
    model, initial = pair(kind, torch.float32)
    model.register_buffer("seen", torch.zeros(2))
    model.train()
    model.get_submodule("transformer.h.0" if kind == "gpt2" else "model.layers.0").eval()
    frozen = list(model.parameters())[1]
    frozen.requires_grad_(False)
    frozen_name = next(name for name, p in model.named_parameters() if p is frozen)
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    real, calls = Estimator._nll, []

    def nll(self, rows):
        calls.append(rows)
        if len(calls) == stop:
            raise Stop
        torch.rand(1)
        model.seen.add_(1)
        return real(self, rows)

    monkeypatch.setattr(Estimator, "_nll", nll)
    before = state_of(model)
    try:
        found = scoring.score(model, initial, MEMBERS, REFERENCE, criterion=criterion, batch_size=2)
    except Stop:
        assert stop
    else:
        assert not stop
        assert frozen_name not in found, "what is not trained is not scored"
    assert_same(before, state_of(model))
    assert torch.equal(last.grad, torch.ones_like(last))
    assert all(hook is None or not hook for hook in (p._post_accumulate_grad_hooks for p in model.parameters()))


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


@pytest.mark.parametrize("kind", ["gpt2", "llama tied", "qwen3_moe"])
def test_from_texts_to_a_rewound_model_by_the_commands(folders, tmp_path, kind, capsys):
    model, base = folders(kind)
    tokenizer = llm_models.tokenizer()
    tokenizer.save_pretrained(model)
    for name, rows in (("members", MEMBERS), ("reference", REFERENCE)):
        lines = (json.dumps({"text": text}) + "\n" for text in llm_models.words(rows))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    before = contents(model), contents(base)
    texts = ["--members", tmp_path / "members.jsonl", "--reference", tmp_path / "reference.jsonl"]
    run(capsys, "score", model, "--base", base, *texts, "--out", tmp_path / "scores", "--max-tokens", 8)
    chosen = run(capsys, "select", tmp_path / "scores", "--rate", 0.05, "--out", tmp_path / "mask.safetensors")
    rewind = ["--base", base, "--mask", tmp_path / "mask.safetensors", "--out", tmp_path / "fixed"]
    assert run(capsys, "rewind", model, *rewind)["rewound"] == chosen["selected"]
    assert (contents(model), contents(base)) == before, "inputs are only read"

    trained = loaded(model)
    scores = scoring.score(trained, base, *([row[:8] for row in rows] for rows in (MEMBERS, REFERENCE)))
    order = sorted(score_files.on_disk(trained, scores).items())
    names = list(Checkpoint(tmp_path / "scores").entries)
    masks = cwfast.select({name: dict(order)[name] for name in names}, rate=0.05)
    assert MaskSet.load(tmp_path / "mask.safetensors") == masks
    fixed = loaded(tmp_path / "fixed")
    rewound = score_files.on_disk(fixed, dict(fixed.named_parameters()))
    for name in names:
        plain = torch.where(masks[name], Checkpoint(base).tensor(name), Checkpoint(model).tensor(name))
        assert torch.equal(rewound[name], plain), name
    made = fixed.generate(torch.tensor([MEMBERS[0][:2]]), max_new_tokens=3, do_sample=False)
    assert made.shape[1] <= 5


def test_a_wrong_base_is_refused_by_its_hash(folders, tmp_path):
    model, base = folders("gpt2")
    scoring.score_folder(model, base, MEMBERS, REFERENCE, tmp_path / "scores")
    masks = cwfast.select(tmp_path / "scores", rate=0.1)
    masks.save(tmp_path / "mask")
    assert MaskSet.load(tmp_path / "mask").base == masks.base
    other = loaded(base)
    with torch.no_grad():
        other.transformer.wte.weight[7, 3] += 1e-3
    save(tmp_path / "other", other)
    with pytest.raises(CheckpointError, match=r"must be the base that .* was made with; the SHA-256 of its '.*wte"):
        rewind_folder(model, tmp_path / "other", tmp_path / "mask", tmp_path / "fixed")
    assert not (tmp_path / "fixed").exists()
    again = save(tmp_path / "again", loaded(base), shard="1GB")  # other files, the same tensors
    rewind_folder(model, again, tmp_path / "mask", tmp_path / "fixed2")


def run(capsys, *arguments):
    """A command's JSON."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments] + ["--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# -- a run that is stopped


class Killed(BaseException):
    pass


def test_a_stopped_run_goes_on_with_what_is_left(folders, tmp_path, monkeypatch):
    model, base = folders("llama")
    arguments = (model, base, MEMBERS, REFERENCE)
    scoring.score_folder(*arguments, tmp_path / "whole")
    passes, real = [], Estimator.scores

    def scores(self, names):
        if len(passes) == 3:
            raise Killed
        passes.append(names)
        return real(self, names)

    monkeypatch.setattr(Estimator, "scores", scores)
    with pytest.raises(Killed):
        scoring.score_folder(*arguments, tmp_path / "out", params_per_pass=600)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="was stopped; resume it"):
        scoring.score_folder(*arguments, tmp_path / "out", params_per_pass=600)
    with pytest.raises(CheckpointError, match="with the same settings"):
        scoring.score_folder(*arguments, tmp_path / "out", points=3, resume=True)
    with pytest.raises(CheckpointError, match="with the same members"):
        scoring.score_folder(model, base, MEMBERS[1:], REFERENCE, tmp_path / "out", resume=True)

    partial = tmp_path / ".out.partial"
    broken = next(iter(json.loads((partial / SCORES).read_text())["tensors"]))
    entry = Checkpoint(partial).entry(broken)  # it is in the manifest, and its bytes did not reach the disk
    with open(entry.file, "r+b") as file:
        file.seek(entry.begin)
        file.write(b"\x01")
    again = []
    monkeypatch.setattr(Estimator, "scores", lambda self, names: again.append(names) or real(self, names))
    scoring.score_folder(*arguments, tmp_path / "out", params_per_pass=600, resume=True)
    done = {name for names in passes for name in names}
    assert done - {name for names in again for name in names}, "finished passes are kept"
    out, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert json.loads(out.pop(SCORES)) == json.loads(whole.pop(SCORES))
    assert out == whole


# -- what is refused


def refused(error, message, *arguments, **options):
    with pytest.raises(error, match=message):
        scoring.score(*arguments, **options)


def test_arguments_that_do_not_fit():
    model, initial = pair("gpt2")
    refused(ValueError, "criterion must be one of", model, initial, MEMBERS, REFERENCE, criterion="fisher")
    refused(ValueError, "lam must lie", model, initial, MEMBERS, REFERENCE, lam=1.5)
    refused(ValueError, "points must be", model, initial, MEMBERS, REFERENCE, points=0)
    refused(ValueError, "batch_size must be", model, initial, MEMBERS, REFERENCE, batch_size=0)
    refused(ValueError, "autocast must be", model, initial, MEMBERS, REFERENCE, autocast=torch.float16)
    refused(ValueError, "granularity must be", model, initial, MEMBERS, REFERENCE, granularity="token")
    refused(ValueError, "include|only", model, initial, MEMBERS, REFERENCE, only=["nothing"])
    refused(ValueError, "members must be a list of texts .* got none", model, initial, [], REFERENCE)
    refused(ValueError, "reference: texts must have a token to score", model, initial, MEMBERS, [[3]])
    refused(ValueError, "reference: texts must have a token to score", model, initial, MEMBERS, [[3, 4], []])
    refused(TypeError, "text 0 is a str", model, initial, ["a text"], REFERENCE)
    refused(TypeError, "1-D int64", model, initial, [torch.tensor([1.0, 2.0])], REFERENCE)
    refused(ValueError, r"tokens in 0 .. 60", model, initial, [[3, 61]], REFERENCE)
    refused(ValueError, "64 tokens; text 0 has 65", model, initial, [[3] * 65], REFERENCE)
    refused(ValueError, "initial must be a copy", model, model.state_dict(), MEMBERS, REFERENCE)
    state = initial.state_dict()
    wpe = state.pop("transformer.wpe.weight")
    refused(ValueError, "1 missing, the first is 'transformer.wpe", model, state, MEMBERS, REFERENCE)
    wide = state | {"transformer.wpe.weight": wpe[:-1]}
    refused(ValueError, "must have the shape of the parameter", model, wide, MEMBERS, REFERENCE)
    refused(TypeError, "in float16, gradients are lost", model.half(), initial, MEMBERS, REFERENCE)
