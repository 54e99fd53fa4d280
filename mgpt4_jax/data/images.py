"""Pictures: read them safely, resize and normalise them exactly as BLIP-2 and MiniGPT-4 do.

Agrees with LAVIS / MiniGPT-4 ``processors/blip_processors.py``: Pillow's bicubic filter on 8-bit
values, the aspect ratio not kept, no EXIF rotation, ``convert("RGB")`` for every other mode.
MiniGPT-4 trains on ``eval_transform`` too (its "train" processor crops nothing); LAVIS crops.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import math
import re
import struct
import urllib.parse
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from mgpt4_jax.errors import UserError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

MAX_PIXELS = 40_000_000
MAX_DATA_URI_BYTES = 64 * 2**20

# Decoders that only decode: EPS, for one, would run a program. A format that this Pillow lacks is left out.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# What Pillow raises on broken or hostile files, across its decoders.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

ImageSource = str | Path | bytes | Image.Image


class CropBox(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture as RGB: a path, the bytes of a file, a ``data:`` URI, or a Pillow image.

    The size is read from the header and capped before anything is decoded. Nothing is fetched: ``http://``
    and ``file://`` are refused. A picture with several frames gives its first.

    Raises:
      UserError: names the file and says why it cannot be read.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the picture", max_pixels)
    if isinstance(source, bytes):
        return _open(io.BytesIO(source), "the picture's bytes", max_pixels)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _open(io.BytesIO(parse_data_uri(source)), "the picture in the data URI", max_pixels)
    if not isinstance(source, str | Path):
        raise UserError(f"a picture is a path, bytes, a data URI or a Pillow image, not {type(source).__name__}")
    path = _local_path(source)
    try:
        with path.open("rb") as file:
            return _open(file, str(path), max_pixels)
    except OSError as error:
        raise UserError(f"{_shorten(path)}: cannot be read ({error.strerror or error})") from error


def eval_transform(image: Image.Image, size: int) -> np.ndarray:
    """Resize to ``size`` x ``size`` and normalise.

    Returns:
      float32 ``[size size 3]``.
    """
    return normalise(resize(image, size))


def crop_transform(image: Image.Image, size: int, box: CropBox | tuple[int, int, int, int], flip: bool) -> np.ndarray:
    """LAVIS's training transform with its random choices given: crop, resize, mirror, normalise.

    Returns:
      float32 ``[size size 3]``.
    """
    return normalise(crop_resize(image, size, box, flip))


def crop_resize(image: Image.Image, size: int, box: CropBox | tuple[int, int, int, int], flip: bool) -> np.ndarray:
    """What ``crop_transform`` normalises: uint8 ``[size size 3]``.

    Args:
      box: (top, left, height, width) in pixels, as ``random_crop_box`` draws it.
      flip: mirror left and right.
    """
    top, left, height, width = (int(value) for value in box)
    pixels = resize(image.crop((left, top, left + width, top + height)), size)
    return pixels[:, ::-1] if flip else pixels


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Pillow's antialiased bicubic resize to a square: uint8 ``[size size 3]``."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def normalise(pixels: np.ndarray) -> np.ndarray:
    """8-bit pixels ``[... 3]`` to CLIP's normalised float32."""
    return (pixels.astype(np.float32) / np.float32(255) - MEAN) / STD


def random_crop_box(
    rng: np.random.Generator,
    width: int,
    height: int,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> CropBox:
    """Draw the box of a random resized crop (torchvision's rule, LAVIS's scales).

    Ten times an area and an aspect ratio are drawn; if none fits, the largest central box with an
    allowed ratio is taken.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return CropBox(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return CropBox((height - h) // 2, (width - w) // 2, h, w)


def parse_data_uri(uri: str, *, max_bytes: int = MAX_DATA_URI_BYTES) -> bytes:
    """The bytes of a base64 ``data:`` URI.

    Blanks, percent escapes, the URL-safe alphabet and missing padding are accepted: all are common and
    none is ambiguous. The stated MIME type is ignored; the content decides.
    """
    head, comma, payload = uri.partition(",")
    if not comma or not head.lower().rstrip().endswith(";base64"):
        raise UserError(f"the data URI {head[:60]!r} is not base64; write it as data:image/png;base64,...")
    if len(payload) > 2 * max_bytes:
        raise UserError(f"the data URI is over {max_bytes >> 20} MiB; pass a path instead")
    text = re.sub(r"\s+", "", urllib.parse.unquote(payload)).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"the data URI {head[:60]!r} holds broken base64 ({error}); encode the file again") from error
    if len(data) > max_bytes:
        raise UserError(f"the data URI is over {max_bytes >> 20} MiB; pass a path instead")
    return data


def _local_path(source: str | Path) -> Path:
    """``source`` as the path of an existing regular file; anything else is refused by name."""
    name = _shorten(source)
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", str(source)):
        mend = "pass the plain path" if scheme[1].lower() == "file" else "download the picture and pass its path"
        raise UserError(f"{name}: {scheme[1]}:// addresses are not read; {mend}")
    try:
        path = Path(source)
        if path.is_file():
            return path
        reason = "is not a file" if path.exists() else "no such file"
    except (OSError, ValueError) as error:  # too long, NUL inside
        raise UserError(f"{name}: not a usable path ({getattr(error, 'strerror', None) or error})") from error
    raise UserError(f"{name}: {reason}; give the path of a picture")


def _open(file: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    """Identify and decode one picture; ``name`` is how errors call it."""
    head = file.read(512)
    file.seek(0)
    try:
        Image.init()
        with _quiet():
            image = Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(_too_large(name, "", max_pixels)) from error
    except _DECODE_ERRORS as error:
        raise UserError(f"{name}: {_describe(head)}") from error
    return _decode(image, name, max_pixels)


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise UserError(f"{name}: the picture is empty ({width} x {height})")
    if width * height > max_pixels:
        raise UserError(_too_large(name, f" ({width} x {height})", max_pixels))
    try:
        with _quiet():
            return image.convert("RGB")
    except _DECODE_ERRORS as error:
        raise UserError(f"{name}: the picture is truncated or broken ({error})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings: of sizes that are capped here, of transparency that is dropped on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _too_large(name: str, size: str, max_pixels: int) -> str:
    return f"{name}: the picture{size} is over the cap of {max_pixels:,} pixels; scale it down first"


def _describe(head: bytes) -> str:
    """Why a file that begins with ``head`` is no picture."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "the file is empty"
    if b"<svg" in text:
        return "SVG drawings are not read; export the picture as PNG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "this is a web page, not a picture; download the picture itself"
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not a picture; fetch the real file"
    if text.startswith(b"%pdf"):
        return "PDF files are not read; export the page as PNG"
    return "not a picture that can be read (JPEG, PNG, WebP, GIF, BMP, TIFF, PPM), or its beginning is broken"


def _shorten(source: object, limit: int = 120) -> str:
    text = str(source)
    return text if len(text) <= limit else text[:limit] + "..."
