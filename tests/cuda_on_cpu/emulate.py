"""CPU tensors with ``backend="cuda"`` run the CUDA kernels on the CPU: patches what the ops ask of ``_backends``."""

import contextlib
import ctypes
import mmap

import torch
from cuda_on_cpu import build

from cwfast import _backends

SIZE = {0: 4, 1: 2, 2: 2, 3: 8}  # bytes of a CwfastDtype
TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
BLOCK = 1 << 16


class CwfastView(ctypes.Structure):
    """As in csrc/cuda/launchers.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("data", "dims", "layout")]


class CwfastSelected(ctypes.Structure):
    """As in csrc/cuda/launchers.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("first", "numel", "picks", "offset", "k", "ranks")),
        ("target", CwfastView),
        ("source", CwfastView),
    ]


class CwfastMatrix(ctypes.Structure):
    """As in csrc/cuda/launchers.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("data", "dtype", "row_stride", "column_stride")]


class CwfastEmbedding(ctypes.Structure):
    """As in csrc/cuda/launchers.h."""

    _fields_ = [
        *((name, CwfastMatrix) for name in ("out", "grad", "grad_outputs", "factor", "partial")),
        *((name, ctypes.c_int64) for name in ("order", "samples", "tokens", "firsts", "first_pieces", "piece_tokens")),
        *((name, ctypes.c_int64) for name in ("cut", "slots")),
        *((name, ctypes.c_int64) for name in ("pieces", "cut_count", "piece_rows", "columns", "power")),
        ("scale", ctypes.c_double),
    ]


class CwfastLmHead(ctypes.Structure):
    """As in csrc/cuda/launchers.h."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("hidden", "weight", "bias", "hidden_stride", "weight_stride", "width")
    ]


class CwfastLmTokens(ctypes.Structure):
    """As in csrc/cuda/launchers.h."""

    _fields_ = [
        *((name, CwfastLmHead) for name in ("model", "reference")),
        *((name, ctypes.c_int64) for name in ("tokens", "words", "dtype")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
        *((name, ctypes.c_int64) for name in ("targets", "logit", "chunks", "chunk", "partial", "counts", "out")),
        *((name, ctypes.c_int64) for name in ("grad", "logsumexp", "ref_logsumexp")),
    ]


class Emulated:
    """Stands in for ``cwfast._C``: the same calls, into the library that g++ made of the same source."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def _call(self, name: str, kinds: str, args: tuple, spans: dict[int, int]) -> None:
        """``kinds``: of the arguments, as in csrc/cuda/launchers.h. ``spans``: what may be touched, address: bytes."""
        with contextlib.ExitStack() as after:
            for address, size in spans.items():
                if address and size > 0:
                    self.library.coc_register(address, size)
                    after.callback(self.library.coc_unregister, address)
            status = getattr(self.library, name)(*(TYPES[k](x) for k, x in zip(kinds, args, strict=True)))
        errors = self.library.coc_errors().decode()
        assert status == 0
        assert not errors, errors

    def cuda_saliency(self, *args):
        out, inputs, x_stride, grads, d_stride, offsets, samples, rows, o, i, dtype = args[:11]
        factor, f_dtype, grad = args[13:16]
        spans = {
            out: o * i * 4,
            inputs: ((rows - 1) * x_stride + i) * SIZE[dtype],
            grads: ((rows - 1) * d_stride + o) * SIZE[dtype],
            offsets: (samples + 1) * 8,
            factor: o * i * SIZE[f_dtype],
            grad: o * i * 4,
        }
        self._call("cwfast_cuda_saliency", "pplplplllliifpipip", args, spans)

    def cuda_select_topk(self, *args):
        chunks, count, dtype, _, state, histogram, ties, tallies = args[:8]
        spans = {chunks: count * 40, state: 16, histogram: 2048 * 8, ties: (count + 1) * 8}
        table = (ctypes.c_int64 * (5 * count)).from_address(chunks) if count else []
        for c in range(count):
            data, bits, start, length, tensor = table[5 * c : 5 * c + 5]
            spans[data] = (start + length) * SIZE[dtype]  # the last chunk of a tensor has its whole extent
            spans[bits] = (start + length + 63) // 64 * 8
            spans[tallies] = (tensor + 1) * 24
        self._call("cwfast_cuda_select_topk", "plii" + "pppp" + "ip", args, spans)

    def _tensors(self, table: int, count: int) -> list[CwfastSelected]:
        return list((CwfastSelected * count).from_address(table))

    def _picks(self, rows: list[CwfastSelected]) -> dict[int, int]:
        spans = {}
        for row in rows:
            blocks = -(-row.numel // BLOCK)
            spans[row.picks] = 2 * row.k if row.offset else (row.numel + 63) // 64 * 8
            spans[row.offset] = (blocks + 1) * 8
        return spans

    def cuda_rewind_survey(self, *args):
        table, count, blocks, counts, wrong = args[:5]
        spans = {table: count * ctypes.sizeof(CwfastSelected), counts: blocks * 64, wrong: count * 4}
        spans |= self._picks(self._tensors(table, count))
        self._call("cwfast_cuda_rewind_survey", "pllppip", args, spans)

    def cuda_rewind_move(self, *args):
        table, count, _, layouts, size = args[:5]
        rows = self._tensors(table, count)
        spans = {table: count * ctypes.sizeof(CwfastSelected)} | self._picks(rows)
        dims = [(v.layout, v.dims) for row in rows for v in (row.target, row.source) if v.dims > 0]
        spans[layouts] = max((16 * n + 8 * at for at, n in dims), default=0)
        for row in rows:
            selected = row.k
            if row.ranks:  # of packed bits, and one side is compact
                spans[row.ranks] = max(1, -(-row.numel // BLOCK)) * 64
                packed = ctypes.string_at(row.picks, (row.numel + 63) // 64 * 8) if row.numel else b""
                selected = int.from_bytes(packed, "little").bit_count()
            for view in (row.target, row.source):
                pairs = (ctypes.c_int64 * (2 * max(view.dims, 0))).from_address(layouts + 8 * view.layout)
                reach = sum((n - 1) * stride for n, stride in zip(pairs[::2], pairs[1::2], strict=True)) + 1
                entries = {-1: selected, 0: row.numel}.get(view.dims, reach)
                spans[view.data] = max(spans.get(view.data, 0), entries * size)
        self._call("cwfast_cuda_rewind_move", "pllpiip", args, spans)

    def cuda_embedding_saliency(self, *args):
        x = CwfastEmbedding(*(CwfastMatrix(*a) if isinstance(a, tuple) else a for a in args[:-2]))

        def longs(address, count):
            return list((ctypes.c_int64 * count).from_address(address))

        which = longs(x.piece_tokens, x.pieces)
        tokens = which[-1] + 1
        rows = longs(x.firsts, tokens + 1)[-1]
        pieces = longs(x.first_pieces, tokens + 1)
        slots = sum(n for n in map(int.__sub__, pieces[1:], pieces) if n > 1)
        words = longs(x.tokens, tokens)[-1] + 1
        spans = dict.fromkeys((x.order, x.samples), rows * 8) | dict.fromkeys((x.tokens, x.slots), tokens * 8)
        spans |= dict.fromkeys((x.firsts, x.first_pieces), (tokens + 1) * 8)
        spans |= {x.piece_tokens: x.pieces * 8, x.cut: x.cut_count * 8}
        high = max(longs(x.order, rows)) + 1
        for m, count in zip(
            (x.out, x.grad, x.grad_outputs, x.factor, x.partial), (words, words, high, words, 4 * slots), strict=True
        ):
            entries = (count - 1) * m.row_stride + (x.columns - 1) * m.column_stride + 1 if count else 0
            spans[m.data] = max(spans.get(m.data, 0), entries * SIZE[m.dtype])
        self._call("cwfast_cuda_embedding_saliency", "pip", (ctypes.addressof(x), *args[-2:]), spans)

    def cuda_lm_tokens(self, task, *args):
        x = CwfastLmTokens(*(CwfastLmHead(*a) if isinstance(a, tuple) else a for a in args[:-2]))
        size, entries = SIZE[x.dtype], 2 * x.chunks * x.tokens
        spans = {x.targets: x.tokens * 8, x.logit: x.tokens * 4, x.partial: entries * 20, x.counts: entries * 8}
        spans |= {x.out: x.tokens * x.words * (4 if task == 3 else size), x.grad: x.tokens * 4}
        spans |= dict.fromkeys((x.logsumexp, x.ref_logsumexp), x.tokens * 8)
        for head in (x.model, x.reference):
            for data, rows, stride in (
                (head.hidden, x.tokens, head.hidden_stride),
                (head.weight, x.words, head.weight_stride),
            ):
                spans[data] = max(spans.get(data, 0), ((rows - 1) * stride + head.width) * size)
            spans[head.bias] = x.words * 4
        self._call("cwfast_cuda_lm_tokens", "ipip", (task, ctypes.addressof(x), *args[-2:]), spans)


def emulate(monkeypatch, stem: str, checked: bool = False, changes=()) -> ctypes.CDLL:
    """The library of ``csrc/cuda/<stem>.cu``, behind ``backend="cuda"`` for CPU tensors; other backends stay."""
    emulated = Emulated(build.library(stem, checked, changes))
    resolve, native = _backends.resolve, _backends.native
    chosen = []

    def fake_resolve(backend, device, supported):
        chosen[:] = [backend]
        return backend if backend == "cuda" else resolve(backend, device, supported)

    monkeypatch.setattr(_backends, "resolve", fake_resolve)
    monkeypatch.setattr(_backends, "native", lambda: emulated if chosen == ["cuda"] else native())
    monkeypatch.setattr(_backends, "cuda_stream", lambda device: 0)
    return emulated.library


def sparse(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that exists only where it is touched."""
    size = torch.Size(shape).numel() * dtype.itemsize
    no_reserve = 0x4000  # MAP_NORESERVE of Linux on x86-64; mmap has no name for it before Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(shape)
