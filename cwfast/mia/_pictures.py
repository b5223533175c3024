"""Samples as a page shows them: images as PNG within the page, anything else as its first numbers."""

import base64
import html
import struct
import zlib

import numpy as np
import numpy.typing as npt

from cwfast.mia._inputs import Array, to_numpy

_NUMBERS = 12  # shown of a sample that is no image
_SIDE = 56  # pixels on the page, at least, of the longer side


def shown(inputs: Array, row: int) -> str:
    """HTML of sample ``row`` of inputs [N, ...]: [H, W], [C, H, W] and [H, W, C] with 1 or 3 channels are images."""
    sample = to_numpy("inputs", inputs[row], "biuf")  # type: ignore[index]
    pixels = _pixels(sample)
    if pixels is None:
        numbers = [f"{value:.4g}" for value in sample.ravel()[:_NUMBERS]]
        more = f", ... ({sample.size} in all)" if sample.size > _NUMBERS else ""
        return f"<code>{html.escape(', '.join(numbers) + more)}</code>"
    height, width = pixels.shape[:2]
    scale = -(-_SIDE // max(height, width))
    size = f"width='{width * scale}' height='{height * scale}'"
    data = base64.b64encode(png(pixels)).decode("ascii")
    return f"<img class='sample' alt='sample {row}' {size} src='data:image/png;base64,{data}'>"


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 [H, W, 1] (grey) or [H, W, 3] (colours)."""
    height, width, channels = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # 0: rows unfiltered

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def _pixels(sample: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8] | None:
    """uint8 [H, W, 1 or 3], or None for what is no image. Values beyond 0 .. 1 are stretched to the whole range."""
    if sample.ndim == 2:
        sample = sample[:, :, None]
    elif sample.ndim == 3 and sample.shape[0] in (1, 3):
        sample = np.moveaxis(sample, 0, 2)
    if sample.ndim != 3 or sample.shape[2] not in (1, 3):
        return None
    values = np.nan_to_num(sample.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if 0 <= low <= high <= 255 and high > 1 and (values == values.round()).all():
        return values.astype(np.uint8)
    if not 0 <= low <= high <= 1:
        values = (values - low) / max(high - low, np.finfo(float).tiny)
    return (values * 255).round().astype(np.uint8)
