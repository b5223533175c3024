"""Attacks on token records, each against its published definition on plain logits, one text at a time, in loops."""

import math
import zlib

import numpy as np
import pytest
import torch

from cwfast import llm, mia
from cwfast.llm import attacks, pairs
from cwfast.llm.storage import TokenRecords

pytest.importorskip("transformers")
import llm_models

pytestmark = pytest.mark.usefixtures("without_torchvision")
ROWS = [[5, 6], [7, 8, 9], *llm_models.ids(9, 4, 24, seed=5)]
TEXTS = llm_models.words(ROWS)


@pytest.fixture(scope="module")
def models(without_torchvision):
    return llm_models.small("llama"), llm_models.small("gpt2")


@pytest.fixture(scope="module")
def records(models):
    return llm.records(models[0], llm_models.tokenizer(), TEXTS, reference=models[1], kl=True)


@pytest.fixture(scope="module")
def plain(models):
    """Per text: (log-softmax of the model, of the reference, targets)."""
    return [(*(llm_models.log_softmax(m, row) for m in models), torch.tensor(row[1:])) for row in ROWS]


def own(logp, target):
    return logp.gather(1, target[:, None])[:, 0].numpy()


def check(got, expected):
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-10)


def test_loss_zlib_and_min_k(records, plain):
    ll = [own(p, y) for p, _, y in plain]
    check(llm.attack("loss", records), [x.mean() for x in ll])
    sizes = [len(zlib.compress(text.encode())) for text in TEXTS]
    check(llm.attack("zlib", records), [x.mean() / size for x, size in zip(ll, sizes, strict=True)])
    for k in (0.05, 0.2, 0.29, 0.6, 1.0):
        lowest = [np.sort(x)[: max(1, int(k * len(x)))].mean() for x in ll]
        check(llm.attack("min_k", records, k=k), lowest)


@pytest.mark.parametrize("k", [0.2, 0.5, 1.0])
def test_min_k_pp_is_the_published_definition_on_logits(records, plain, k):
    expected = []
    for logp, _, target in plain:
        mu = (logp.exp() * logp).sum(-1)  # mink-plus-plus, run.py: probs * log_probs
        sigma = (logp.exp() * logp.square()).sum(-1) - mu.square()
        score = (own(logp, target) - mu.numpy()) / sigma.sqrt().numpy()
        expected.append(np.sort(score)[: max(1, int(len(score) * k))].mean())
    check(llm.attack("min_k_pp", records, k=k), expected)


def test_surp(records, plain):
    limit = float(np.median(records["entropy"]))
    expected = []
    for logp, _, target in plain:
        ll, entropy = own(logp, target), -(logp.exp() * logp).sum(-1).numpy()
        lowest = np.argsort(ll, kind="stable")[: max(1, int(0.4 * len(ll)))]
        chosen = [ll[t] for t in lowest if entropy[t] < limit]
        expected.append(np.mean(chosen) if chosen else -100.0)
    assert -100.0 in expected
    assert max(expected) > -100.0
    check(llm.attack("surp", records, k=0.4, entropy=limit), expected)


def test_dc_pdd(records, plain):
    counts = llm.token_counts(llm_models.tokenizer(), TEXTS[:4], llm_models.VOCABULARY)
    assert (
        counts.tolist()
        == np.bincount([token for row in ROWS[:4] for token in row], minlength=llm_models.VOCABULARY).tolist()
    )
    expected = []
    for (logp, _, target), row in zip(plain, ROWS, strict=True):
        values, seen = [], set()
        for p, token in zip(np.exp(own(logp, target)), row[1:], strict=True):
            if token not in seen:
                seen.add(token)
                frequency = (counts[token].item() + 1) / (counts.sum().item() + llm_models.VOCABULARY)
                values.append(min(p * math.log(1 / frequency), 0.01))
        expected.append(np.mean(values))
    check(llm.attack("dc_pdd", records, counts=counts), expected)
    with pytest.raises(ValueError, match="counts must be"):
        llm.attack("dc_pdd", records, counts=counts[:5])


def test_reference_difference_ratio_and_control(records, plain):
    a, b = ([own(x[i], x[2]).mean() for x in plain] for i in (0, 1))
    check(llm.attack("reference", records), np.subtract(a, b))
    check(llm.attack("ratio", records), [-(x / y) for x, y in zip(a, b, strict=True)])
    check(attacks.reference_only(records), b)


def test_ez_mia(records, plain):
    expected = []
    for logp, ref, target in plain:
        delta = own(logp, target) - own(ref, target)
        wrong = [t for t in range(1, len(target)) if int(logp[t].argmax()) != int(target[t])]
        up = sum(max(delta[t], 0) for t in wrong)
        down = sum(max(-delta[t], 0) for t in wrong)
        expected.append(math.log((up + 1e-12) / (down + 1e-12)) if len(wrong) >= 2 else 0.0)
    assert 0.0 in expected
    check(llm.attack("ez_mia", records), expected)


def test_wbc(records, plain):
    expected = []
    for logp, ref, target in plain:
        nll, nll_ref = -own(logp, target), -own(ref, target)
        shares = []
        for width in pairs.WINDOWS:
            w = min(width, len(nll))
            wins = [nll_ref[i : i + w].sum() > nll[i : i + w].sum() for i in range(len(nll) - w + 1)]
            shares.append(np.mean(wins))
        expected.append(np.mean(shares))
    check(llm.attack("wbc", records), expected)
    same = TokenRecords(
        records.offsets, records.tokens, {**records.values, "reference.logprob": records.values["logprob"]}
    )
    assert llm.attack("wbc", same).tolist() == [0.0] * len(ROWS)  # strictly larger: ties do not count


def test_informia(records, plain):
    tokens = []
    for logp, ref, target in plain:
        tokens.append(own(logp, target) - own(ref, target) + (ref.exp() * (ref - logp)).sum(1).numpy())
    check(llm.attack("informia", records), [x.mean() for x in tokens])
    check(llm.attack("informia", records, k=0.3), [np.sort(x)[: max(1, int(0.3 * len(x)))].mean() for x in tokens])


def test_attacks_that_read_a_text_again(models, records, plain):
    model, tokenizer = models[0], llm_models.tokenizer()
    ll = np.array([own(p, y).mean() for p, _, y in plain])

    def mean(row, skip=1):
        logp = llm_models.log_softmax(model, row)
        return own(logp, torch.tensor(row[1:]))[skip - 1 :].mean()

    upper = [text.upper() for text in TEXTS]
    assert llm.lowercased(upper) == TEXTS
    unknown = llm.records(model, tokenizer, upper)
    expected = np.array([mean([2] * len(row)) for row in ROWS])
    check(llm.attack("lowercase", records, lower=unknown), expected / ll)

    changed = llm.neighbours(TEXTS, copies=3, share=0.2, seed=1)
    assert len(changed) == 3 * len(TEXTS)
    moved = [sum(a != b for a, b in zip(x.split(), TEXTS[i // 3].split(), strict=True)) for i, x in enumerate(changed)]
    assert all(n <= max(1, int(0.2 * len(TEXTS[i // 3].split()))) for i, n in enumerate(moved))
    assert sum(moved) > 0
    ids = [tokenizer(x)["input_ids"] for x in changed]
    near = np.array([mean(row) for row in ids]).reshape(-1, 3).mean(1)
    check(llm.attack("neighbourhood", records, neighbours=llm.records(model, tokenizer, changed)), ll - near)

    shuffled = llm.swapped(TEXTS, copies=2, seed=1)
    assert [sorted(x.split()) for x in shuffled] == [sorted(x.split()) for x in TEXTS for _ in range(2)]
    assert shuffled != [x for x in TEXTS for _ in range(2)]

    def distance(row):
        x = np.sort(own(llm_models.log_softmax(model, row), torch.tensor(row[1:])))
        return x[-max(1, int(0.05 * len(x))) :].mean() - x[: max(1, int(0.3 * len(x)))].mean()

    far = np.array([distance(tokenizer(x)["input_ids"]) for x in shuffled]).reshape(-1, 2).mean(1)
    got = llm.attack("pac", records, swapped=llm.records(model, tokenizer, shuffled))
    check(got, far - np.array([distance(row) for row in ROWS]))

    outside, inside = [5, 6, 7, 8], [9, 10]
    conditional = [np.array([mean(p + row, len(p)) for row in ROWS]) for p in (outside, inside)]
    given = [llm.records(model, tokenizer, TEXTS, prefix=p) for p in (outside, inside)]
    check(llm.attack("recall", records, prefixed=given[0]), conditional[0] / ll)
    expected = (conditional[0] - 0.5 * conditional[1]) / ll
    check(llm.attack("con_recall", records, prefixed=given[0], member_prefixed=given[1]), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
def test_gradient_norms_against_one_backward_pass_per_text(kind):
    model = llm_models.small(kind)
    model.train()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    got = llm.gradient_norms(model, None, ROWS, batch_tokens=60)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    expected = []
    for row in ROWS:
        ids = torch.tensor([row])
        model.zero_grad()
        logp = model(ids).logits[0, :-1].log_softmax(-1)  # transformers' own loss is in float32
        (-logp.gather(1, ids[0, 1:, None])).mean().backward()
        layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
        norms = [m.weight.grad.norm() for m in layers if m is not model.get_output_embeddings()]
        expected.append(torch.stack(norms).mean())
    tolerance = 1e-5 if kind == "gemma2" else 1e-9  # its softmax is in float32
    torch.testing.assert_close(got, torch.stack(expected), rtol=tolerance, atol=tolerance)
    scored = llm.attack("gradient_norm", llm.records(model, None, ROWS), norms=got)
    check(scored, -got.numpy())


def test_shadows_are_cwfast_mias(models, records, plain):
    kinds = ("qwen2", "mistral", "qwen3", "granite", "cohere")
    shadows = [llm.records(llm_models.small(kind), llm_models.tokenizer(), TEXTS) for kind in kinds]
    ll = np.stack([np.array([own(p, y).mean() for p, _, y in plain]), *(llm.attack("loss", one) for one in shadows)])
    member = np.random.default_rng(0).random(ll.shape).argsort(axis=0) < 3
    phi = np.log(np.exp(ll) / (1 - np.exp(ll)))
    given = {"shadows": shadows, "membership": member}
    check(llm.attack("lira", records, **given), mia.lira(phi, member, 0))
    check(llm.attack("lira", records, mode="offline", **given), mia.lira(phi, member, 0, mode="offline"))
    check(llm.attack("rmia", records, **given), mia.rmia(ll, member, 0, gamma=1.0))
    check(llm.attack("base", records, **given), mia.base(ll, member, 0))
    with pytest.raises(ValueError, match="records of the same tokens; those of shadow 0 differ"):
        llm.attack("rmia", records, shadows=[shadows[0].select(list(range(10, -1, -1)))], membership=member[:2])


def test_every_attack_calls_a_memorised_text_a_member(without_torchvision):
    """Six texts fitted until they are known by heart, six not: the sign of every score."""
    rows = llm_models.ids(16, 16, 24, seed=9)
    texts, tokenizer = llm_models.words(rows[:12]), llm_models.tokenizer()
    base = llm_models.small("llama", torch.float32)
    model = llm_models.small("llama", torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(model(torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows[:6]).backward()
        optimizer.step()

    def again(given, **more):
        return llm.records(model, tokenizer, given, **more)

    records = again(texts, reference=base, kl=True)
    member = np.arange(12) < 6
    shots = rows[12]
    given = {
        "dc_pdd": {"counts": llm.token_counts(tokenizer, llm_models.words(rows[12:]), 61), "a": 1.0},
        "lowercase": {"lower": again([text.upper() for text in texts])},
        "neighbourhood": {"neighbours": again(llm.neighbours(texts, share=0.2))},
        "pac": {"swapped": again(llm.swapped(texts))},
        "recall": {"prefixed": again(texts, prefix=shots)},
        "con_recall": {"prefixed": again(texts, prefix=shots), "member_prefixed": again(texts, prefix=rows[14])},
        "gradient_norm": {"norms": llm.gradient_norms(model, tokenizer, texts)},
    }
    others = [again(texts)] + [llm.records(base, tokenizer, texts)] * 3
    membership = np.stack([member, member, ~member, ~member, ~member])
    shadowed = {"shadows": others, "membership": membership}
    given |= {"base": shadowed, "rmia": shadowed}
    for name in attacks.ATTACKS:
        if name != "lira":  # it needs several models on each side
            scores = llm.attack(name, records, **given.get(name, {}))
            assert mia.metrics.auc(scores, member) == 1.0, name


def test_what_is_refused(records):
    with pytest.raises(ValueError, match="name must be among loss, zlib"):
        llm.attack("losss", records)
    with pytest.raises(TypeError, match="the attack recall must be given prefixed; got nothing"):
        llm.attack("recall", records)
    alone = TokenRecords(records.offsets, records.tokens, {"logprob": records.values["logprob"]})
    with pytest.raises(KeyError, match=r"must hold 'reference.logprob' for that.*give records\(\) a reference"):
        llm.attack("wbc", alone)
    with pytest.raises(KeyError, match="sizes of compressed texts"):
        llm.attack("zlib", alone)
    with pytest.raises(ValueError, match=r"k must lie in \(0, 1\]; got 0"):
        llm.attack("min_k", records, k=0)
    with pytest.raises(ValueError, match="lower must be records of 11 texts; got 3"):
        llm.attack("lowercase", records, lower=records.select([0, 1, 2]))
    assert set(llm.ATTACKS) == set(attacks.ATTACKS)
