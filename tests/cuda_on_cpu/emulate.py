"""CPU tensors with ``backend="cuda"`` run the CUDA kernels on the CPU: patches what the ops ask of ``_backends``."""

import contextlib
import ctypes
import mmap

import torch
from cuda_on_cpu import build

from cwfast import _backends

SIZE = {0: 4, 1: 2, 2: 2}  # bytes of a CwfastDtype
TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


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
