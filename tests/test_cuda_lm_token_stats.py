"""The CUDA kernels of lm_token_stats and lm_token_kl, executed on the CPU, through the ops.

Plain runs find wrong values; checked runs also find races, reads and writes out of bounds, misalignment, use of
uninitialised shared memory. Not found: a layout of tensor-core fragments misread the same way in the kernel and in its
host twin, and anything about speed.
"""

import itertools

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.emulate import emulate, sparse

from cwfast import ops, reference
from cwfast.errors import BackendUnavailable
from cwfast.ops import _lm_token_stats_device as device
from cwfast.ops._lm_token_parts import finish, merge
from cwfast.reference import LMHead
from cwfast.testing import assert_no_worse

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=f"CUDA on the CPU {build.why_not()}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EXACT = ("rank", "correct", "topk_indices")


@pytest.fixture(params=["plain", "checked"])
def library(request, monkeypatch):
    return emulate(monkeypatch, "lm_token_stats", request.param == "checked")


def flat(stats):
    values = stats._asdict()
    topk = values.pop("topk")
    return values | {"topk_logprob": topk.logprob, "topk_indices": topk.indices}


def integers(tokens, words, width, dtype):
    """Products and sums are exact in float32: the kernels and the reference see the same logits."""
    weight = (torch.randint(-4, 5, (words, width)) / 4).to(dtype)
    return torch.randint(-2, 3, (tokens, width)).to(dtype), weight, torch.randint(words, (tokens,))


def run(hidden, weight, targets, **options):
    """Each value is as near to float64 as the plain formulas in float32; what is exact is equal."""
    found = flat(ops.lm_token_stats(hidden, weight, targets, backend="cuda", **options))
    topk = options.pop("topk", 0)
    truth, plain = (
        flat(reference.lm_token_stats(hidden.to(t), head_of(weight, t, **options), targets, topk))
        for t in (torch.float64, torch.float32)
    )
    for name, value in found.items():
        if name in EXACT:
            assert torch.equal(value, plain[name]), name
        elif value.numel():
            assert_no_worse(value, truth[name], plain[name], factor=4)


def head_of(weight, dtype, bias=None, softcap=None, scale=1.0):
    return LMHead(weight.to(dtype), None if bias is None else bias.to(dtype), softcap, scale)


# Tiles are 128 x 128 in strips of 64 words; a stage holds 16 columns (float32) or 32; 3 stages are under way.
SHAPES = [(1, 1, 1), (3, 2, 5), (5, 63, 8), (127, 64, 16), (128, 65, 33), (129, 129, 100), (40, 700, 17), (2, 1300, 72)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@by_dtype
def test_no_worse_at_every_block_edge(library, shape, dtype):
    hidden, weight, targets = integers(*shape, dtype)
    run(hidden, weight, targets)
    run(hidden, weight, targets, bias=torch.randint(-3, 4, (shape[1],)).to(dtype), scale=0.5, topk=min(shape[1], 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softcap_and_extreme_logits(monkeypatch, dtype):
    emulate(monkeypatch, "lm_token_stats")
    hidden, weight, targets = integers(20, 400, 16, dtype)
    targets[:10] = (hidden[:10].float() @ weight.float().T).argmax(dim=1)  # members: the target dominates
    run(hidden, weight, targets, scale=1e4)
    bias = torch.zeros(400)
    bias[::3] = -torch.inf
    targets = torch.where(targets % 3 == 0, targets // 3 * 3 + 1, targets)
    run(hidden, weight, targets, bias=bias)
    found = ops.lm_token_stats(hidden, weight, targets, softcap=3.0, backend="cuda")
    truth = reference.lm_token_stats(hidden.double(), head_of(weight, torch.float64, softcap=3.0), targets, 0)
    for name in ("logprob", "logsumexp", "mean", "variance", "entropy"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(truth, name), rtol=1e-5, atol=1e-6)


def test_variance_keeps_its_digits_where_its_squares_cancel(monkeypatch):
    emulate(monkeypatch, "lm_token_stats")
    weight = torch.zeros(3000, 1)
    weight[77] = 1.0
    hidden, targets = torch.tensor([[1e-3], [5.0], [20.0]]), torch.tensor([77, 0, 77])
    found = ops.lm_token_stats(hidden, weight, targets, backend="cuda")
    truth = ops.lm_token_stats(hidden.double(), weight.double(), targets, backend="reference")
    for name in ("logprob", "mean", "variance", "entropy"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(truth, name), rtol=1e-5, atol=0)


def test_rows_without_a_distribution(monkeypatch):
    emulate(monkeypatch, "lm_token_stats")
    hidden = torch.tensor([[torch.nan, 0.0], [torch.inf, 1.0], [1.0, 0.0], [3e38, 3e38]])
    stats = ops.lm_token_stats(hidden, torch.ones(140, 2), torch.tensor([0, 3, 0, 139]), topk=1, backend="cuda")
    bad = torch.tensor([True, True, False, True])
    for name, value in flat(stats).items():
        if name in EXACT:
            assert (value.reshape(-1)[bad] == (0 if name == "correct" else -1)).all()
        else:
            assert torch.equal(value.reshape(-1).isnan(), bad), name


def logits(hidden, weight, bias, softcap, scale):
    z = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def logprobs(h, w, targets, *, backend=None, **options):
    if backend:
        return ops.lm_token_stats(h, w, targets, backend=backend, **options).logprob
    return torch.log_softmax(logits(h, w, **options), dim=1).gather(1, targets[:, None])[:, 0]


def divergences(h, w, ref_h, ref_w, *, backend=None, **options):
    if backend:
        return ops.lm_token_kl(h, w, ref_h, ref_w, backend=backend, **options)
    q = torch.log_softmax(logits(ref_h.to(h.dtype), ref_w.to(h.dtype), None, options["softcap"], options["scale"]), 1)
    return (q.exp() * (q - torch.log_softmax(logits(h, w, **options), dim=1))).sum(dim=1)


@pytest.mark.parametrize("shape", [(1, 5, 2), (130, 70, 9), (40, 300, 40)], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "scale": 0.5}], ids=["plain", "softcap"])
@pytest.mark.parametrize("what", ["logprob", "kl"])
@by_dtype
def test_gradients_are_no_worse_than_autograd(library, monkeypatch, shape, what, options, dtype):
    monkeypatch.setattr(device, "WORKSPACE", 256 * 1024 * dtype.itemsize // 2)  # several tiles of gradients
    tokens, words, width = shape
    hidden, weight, targets = integers(*shape, dtype)
    others = (targets,)
    if what == "kl":
        others = integers(tokens, words, width + 3, dtype)[:2]
    bias, upstream = torch.randn(words).to(dtype), torch.randn(tokens)
    options = {"softcap": None, "scale": 1.0} | options

    def both(cast, backend=None):
        inputs = [x.detach().to(cast).requires_grad_() for x in (hidden, weight, bias)]
        function = logprobs if what == "logprob" else divergences
        value = function(*inputs[:2], *others, bias=inputs[2], backend=backend, **options)
        return value, *torch.autograd.grad(value, inputs, upstream.to(value.dtype))

    ours, truth, single = both(dtype, "cuda"), both(torch.float64), both(torch.float32)
    if dtype != torch.float32:  # gradients at logits and products are rounded: as plain PyTorch in this dtype does
        single = single[0], *both(dtype)[1:]
    for found, exact, plain in zip(ours, truth, single, strict=True):
        assert_no_worse(found, exact.detach(), plain.detach(), factor=4)


def test_same_bits_for_every_schedule(monkeypatch):
    library = emulate(monkeypatch, "lm_token_stats")
    hidden, weight = torch.randn(150, 40).bfloat16(), torch.randn(300, 40).bfloat16()
    targets = torch.randint(300, (150,))

    def once(seed):
        library.coc_configure(seed, 1 + seed % 3, None, 0)
        return flat(ops.lm_token_stats(hidden, weight, targets, backend="cuda"))

    first = once(0)
    for seed in range(1, 6):
        assert all(torch.equal(value, first[name]) for name, value in once(seed).items())


def test_any_strides_and_the_vocabulary_in_parts(library):
    hidden, weight, targets = integers(30, 500, 24, torch.bfloat16)
    whole = flat(ops.lm_token_stats(hidden, weight, targets, topk=3, backend="cuda"))
    wide = torch.full((500, 51), torch.nan, dtype=torch.bfloat16)
    wide[:, 3:27] = weight
    for name, value in flat(ops.lm_token_stats(hidden, wide[:, 3:27], targets, topk=3, backend="cuda")).items():
        assert torch.equal(value, whole[name])  # unaligned rows
    for name, value in flat(
        ops.lm_token_stats(hidden.T.contiguous().T, weight, targets, topk=3, backend="cuda")
    ).items():
        assert torch.equal(value, whole[name])
    edges = [0, 1, 130, 130, 500]
    heads = [(LMHead(weight[a:b]), a) for a, b in itertools.pairwise(edges)]
    logit = torch.stack([device.target_logits(hidden, head, targets, a, "cuda") for head, a in heads]).amax(dim=0)
    parts = [device.parts_of(hidden, head, targets, logit, 3, a, 500, "cuda") for head, a in heads]
    total = parts[2]
    for part in (parts[0], parts[3], parts[1]):
        total = merge(total, part)
    for value, (name, expected) in zip(finish(total, logit, targets), whole.items(), strict=False):
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-6, msg=name)


def test_offsets_above_2_to_the_31(monkeypatch):
    emulate(monkeypatch, "lm_token_stats", True)
    far = (3 << 30) // 2
    rows = [sparse((2 * far + 8,), torch.bfloat16).as_strided((3, 8), (far, 1)) for _ in range(2)]
    hidden, weight, targets = integers(3, 3, 8, torch.bfloat16)
    rows[0].copy_(hidden)
    rows[1].copy_(weight)
    run(*rows, targets)


def test_float64_is_refused(monkeypatch):
    emulate(monkeypatch, "lm_token_stats")
    with pytest.raises(BackendUnavailable, match=r"got torch\.float64"):
        ops.lm_token_stats(torch.zeros(2, 3).double(), torch.zeros(4, 3).double(), torch.tensor([0, 1]), backend="cuda")


PLANTED = {  # text in csrc/cuda/lm_token_stats*, replacement; each must be caught by the runs of catch()
    "no barrier in the pipeline": ("__syncthreads();  // this stage", "// this stage"),
    "no barrier before a product": ("__syncthreads();  // all have left the product", "// all have left the product"),
    "waits for too few copies": ("wait_for_copies<kStages - 2>();", "wait_for_copies<kStages - 1>();"),
    "the strip is read too early": ("__syncthreads();  // the strip is complete", ""),
    "the strip is overwritten": ("__syncthreads();  // all have left the strip\n", "\n"),
    "fragments swapped": ("b[n][1] = pair[1], b[n + 1][0] = pair[2]", "b[n][1] = pair[2], b[n + 1][0] = pair[1]"),
    "half of the depth": ("k < kDepth<T>; k += kStep", "k < kStep; k += kStep"),
    "one token more": ("first + r < count ?", "first + r <= count ?"),
    "columns past the width": ("there < kChunk<T> ? there : kChunk<T>", "there < 0 ? there : kChunk<T>"),
    "takes unaligned rows for aligned": ("if (rows.aligned) {", "if (true) {"),
    "32-bit row offset": ("row * rows.stride", "(int)row * (int)rows.stride"),
    "the last of equal logits": ("if (x > peak) peak = x", "if (x >= peak) peak = x"),
    "rank counts ties": ("s.above += x > own;", "s.above += x >= own;"),
    "sums are not rescaled": ("s.rest = sum, s.tops = 0.0f;", "s.rest = s.tops + s.rest, s.tops = 0.0f;"),
    "moments about the largest": ("record ? 0.0f : s.mean, shift", "0.0f, shift"),
    "no variance between strips": (" + d * d * sum * (more / both)", ""),
    "bias after scale": ("z *= args.scale;", "z = bias ? (z - bias[word]) * args.scale + bias[word] : z * args.scale;"),
    "reference of KL not rescaled": ("s.ref_sum *= expf(ref_step);", ""),
    "slope of the soft-cap": ("d *= 1.0f - z * z;", "d *= 1.0f - z;"),
    "no target in the gradient": ("(v == args.targets[n] ? 1.0f : 0.0f) - d", "-d"),
}  # fmt: skip


def catch(name: str) -> None:
    """Plant one defect and run; called in a process of its own, which the defect may crash."""
    patch = pytest.MonkeyPatch()
    library = emulate(patch, "lm_token_stats", checked=True, changes=(PLANTED[name],) if name else ())
    for dtype in DTYPES:
        test_no_worse_at_every_block_edge(library, (129, 150, 100), dtype)
        test_no_worse_at_every_block_edge(library, (5, 1300, 17), dtype)
        for what in ("logprob", "kl"):
            with pytest.MonkeyPatch.context() as inner:
                options = {"softcap": 4.0, "scale": 0.5}
                test_gradients_are_no_worse_than_autograd(library, inner, (40, 300, 40), what, options, dtype)
    test_any_strides_and_the_vocabulary_in_parts(library)
    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(build, "library", lambda *args: library)
        test_variance_keeps_its_digits_where_its_squares_cancel(inner)
        test_offsets_above_2_to_the_31(inner)


@pytest.mark.parametrize("name", build.some_slow(["", *PLANTED]))
def test_planted_defect_is_caught(name):
    build.check_planted("test_cuda_lm_token_stats", name)
