"""Pictures that make Pillow talk: what it would print is either our error or no news."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import pytest
from PIL import Image

from mgpt4_jax.data.images import load_image
from mgpt4_jax.errors import UserError


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_refused_bomb_says_so_once() -> None:
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"") + _chunk(b"IEND", b"")
    with warnings.catch_warnings(record=True) as said, pytest.raises(UserError, match="10000 x 10000.*over the cap"):
        warnings.simplefilter("always")
        load_image(png)
    assert not said


def test_a_palette_with_transparency_is_read_in_silence() -> None:
    picture, file = Image.new("P", (4, 4)), io.BytesIO()
    picture.putpalette(bytes(range(256)) * 3)
    picture.save(file, "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert load_image(file.getvalue()).mode == "RGB"
    assert not said
