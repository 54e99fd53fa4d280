"""Pictures against the original preprocessing, and the files that users should not be able to break us with."""

from __future__ import annotations

import base64
import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgpt4_jax.data.images import (
    MAX_PIXELS,
    CropBox,
    crop_transform,
    eval_transform,
    load_image,
    parse_data_uri,
    random_crop_box,
    resize,
)
from mgpt4_jax.errors import UserError


@pytest.fixture(scope="module")
def case(golden_dir: Path) -> tuple[Path, dict[str, np.ndarray]]:
    folder = golden_dir / "preprocess"
    with np.load(folder / "outputs.npz") as file:
        return folder, dict(file)


def picture(folder: Path, index: str) -> Image.Image:
    return load_image(folder / f"image_{index}.png")


def encoded(image: Image.Image | None = None, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or noise()).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 32, height: int = 24, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def test_resize_is_bit_equal(case):
    folder, outputs = case
    keys = [key for key in outputs if key.startswith("resized_u8_")]
    assert keys
    for key in keys:
        index, size = key.removeprefix("resized_u8_").split("_")
        np.testing.assert_array_equal(resize(picture(folder, index), int(size)), outputs[key], err_msg=key)


def test_eval_transform_equals_the_original(case):
    folder, outputs = case
    keys = [key for key in outputs if key.startswith("eval_")]
    assert keys
    for key in keys:
        index, size, *rows = re.fullmatch(r"eval_(\d+)_(\d+)(?:_rows([\d_]+))?", key).groups()
        pixels = eval_transform(picture(folder, index), int(size)).transpose(2, 0, 1)
        if rows[0]:
            pixels = pixels[:, [int(row) for row in rows[0].split("_")]]
        assert pixels.dtype == np.float32
        np.testing.assert_allclose(pixels, outputs[key], rtol=1e-6, atol=1e-6, err_msg=key)


def test_crop_transform_equals_the_original(case):
    folder, outputs = case
    keys = [key for key in outputs if re.fullmatch(r"train_\d+", key)]
    assert keys
    for key in keys:
        index = key.removeprefix("train_")
        box, flip = outputs[f"train_box_{index}"], bool(outputs[f"train_flip_{index}"])
        pixels = crop_transform(picture(folder, index), outputs[key].shape[-1], box, flip)
        np.testing.assert_allclose(pixels.transpose(2, 0, 1), outputs[key], rtol=1e-6, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (1, 20000), (20000, 1), (1, 1), (33, 500)])
def test_random_crop_box_is_inside(width, height):
    rng = np.random.default_rng(0)
    for _ in range(200):
        top, left, h, w = random_crop_box(rng, width, height)
        assert 0 <= top
        assert 0 <= left
        assert 0 < h <= height - top
        assert 0 < w <= width - left


def test_random_crop_box_follows_the_rule():
    rng = np.random.default_rng(1)
    boxes = [random_crop_box(rng, 1000, 1000) for _ in range(2000)]
    areas = np.array([box.height * box.width for box in boxes]) / 1e6
    ratios = np.array([box.width / box.height for box in boxes])
    assert 0.499 < areas.min()
    assert areas.max() <= 1
    assert ratios.min() > 0.749
    assert ratios.max() < 1.335
    assert abs(np.log(ratios).mean()) < 0.02  # as often wide as tall
    assert random_crop_box(rng, 1000, 10) == CropBox(0, 493, 10, 13)  # nothing fits: the widest allowed, central
    assert random_crop_box(np.random.default_rng(7), 50, 60) == random_crop_box(np.random.default_rng(7), 50, 60)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16", "F"])
def test_every_mode_becomes_rgb(mode):
    image = Image.fromarray(np.full((6, 5), 60000, np.uint16)) if mode == "I;16" else noise(5, 6, "L").convert(mode)
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image.convert("RGB")))
    if mode == "I;16":
        assert np.asarray(loaded).min() == 255  # clipped, as upstream clips


def test_hidden_colour_of_transparent_pixels_shows_through():
    assert load_image(Image.new("RGBA", (2, 2), (200, 10, 20, 0))).getpixel((0, 0)) == (200, 10, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_common_formats_are_read(kind, tmp_path):
    path = tmp_path / "picture.bin"  # the content decides, not the name
    path.write_bytes(encoded(kind=kind))
    assert load_image(str(path)).size == (32, 24)
    assert load_image(path.read_bytes()).size == (32, 24)


def test_first_frame_of_several(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_orientation_in_exif_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(noise(8, 4), "JPEG", exif=exif)).size == (8, 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_shapes_are_resized(size):
    pixels = eval_transform(load_image(Image.new("RGB", size, "white")), 28)
    assert pixels.shape == (28, 28, 3)
    assert np.isfinite(pixels).all()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises ``width`` x ``height`` and has one byte of data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def huge_text_png() -> bytes:
    """A small picture whose text chunk unpacks to 20 MB."""
    data = b"note\0\0" + zlib.compress(b"a" * 20_000_000, 1)
    text = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = encoded()
    return whole[:33] + text + whole[33:]


JPEG = encoded(noise(64, 64), "JPEG")

BAD_FILES = {
    "empty": (b"", "is empty"),
    "one byte": (b"\xff", "not a picture"),
    "text": (b"just words", "not a picture"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "web page with a byte-order mark": (b"\xef\xbb\xbf\n<html>quota exceeded", "web page"),
    "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS pointer"),
    "pdf": (b"%PDF-1.7\n", "PDF"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
    "jpeg of 100 bytes": (JPEG[:100], "picture"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "truncated or broken"),
    "jpeg without its last bytes": (JPEG[:-2], "truncated or broken"),
    "half a png": (encoded()[:400], "truncated or broken"),
    "broken png data": (png_header(10, 10), "truncated or broken"),
    "png of no size": (png_header(0, 10), "picture"),
    "half a gif": (encoded(kind="GIF")[:200], "picture"),
    "half a webp": (encoded(kind="WEBP")[:60], "picture"),
    "half a tiff": (encoded(kind="TIFF")[:60], "picture"),
    "bmp header alone": (encoded(kind="BMP")[:54], "truncated or broken"),
    "text chunk bomb": (huge_text_png(), "picture"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_name(name, tmp_path):
    data, reason = BAD_FILES[name]
    path = tmp_path / "victim.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError, match=reason) as caught:
        load_image(path)
    assert "victim.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("width", "height"), [(10_000, 5_000), (12_000, 10_000), (40_000, 40_000)])
def test_pixel_bombs_are_refused_from_the_header(width, height, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's own, before ours
        with pytest.raises(UserError, match=r"bomb\.png.* over the cap of 40,000,000 pixels"):
            load_image(path)


def test_pixel_cap_is_the_callers(tmp_path):
    assert MAX_PIXELS == 40_000_000
    with pytest.raises(UserError, match=r"32 x 24.* over the cap of 100 pixels"):
        load_image(encoded(), max_pixels=100)
    with pytest.raises(UserError, match="over the cap"):
        load_image(noise(), max_pixels=100)


@pytest.mark.parametrize("size", [(0, 10), (10, 0)])
def test_picture_of_no_size(size):
    with pytest.raises(UserError, match="empty"):
        load_image(Image.new("RGB", size))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("http://example.com/cat.jpg", "http:// addresses are not read; download"),
        ("HTTPS://example.com/cat.jpg", "not read; download"),
        ("file:///etc/passwd", "file:// addresses are not read; pass the plain path"),
        ("s3://bucket/cat.jpg", "not read"),
        ("nowhere/cat.jpg", "no such file"),
        ("", "is not a file"),
        ("cat\0.jpg", "not a usable path|no such file"),
        ("A" * 10_000, "not a usable path|no such file"),
        (".", "is not a file"),
        ("/dev/zero", "is not a file"),
        (None, "not NoneType"),
        (7, "not int"),
    ],
)
def test_bad_sources_are_refused(source, reason):
    with pytest.raises(UserError, match=reason) as caught:
        load_image(source)
    assert len(str(caught.value)) < 400


def test_data_uris_are_read_however_they_are_written():
    data = encoded(noise(9, 5))
    text = base64.b64encode(data).decode()
    forms = [
        f"data:image/png;base64,{text}",
        f"DATA:image/png;base64,{text}",
        f"data:;base64,{text.rstrip('=')}",
        f"data:image/jpeg;base64,{text}",  # the content decides
        f"data:image/png;charset=utf-8;base64,{' '.join(text[i : i + 60] for i in range(0, len(text), 60))}\n",
        f"data:image/png;base64,{text.replace('+', '-').replace('/', '_')}",
        f"data:image/png;base64,{text.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
    ]
    for uri in forms:
        assert load_image(uri).size == (9, 5), uri[:60]


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:", "not base64"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64", "not base64"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,A", "broken base64"),
        ("data:image/png;base64,%%%%", "broken base64"),
        ("data:image/png;base64,AAAA=AAAA", "broken base64"),
        ("data:image/png;base64,éééé", "broken base64"),
        ("data:text/html;base64," + base64.b64encode(b"<html></html>").decode(), "web page"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(), "SVG"),
        ("data:image/png;base64," + base64.b64encode(encoded()[:100]).decode(), "picture"),
    ],
)
def test_bad_data_uris_are_refused(uri, reason):
    with pytest.raises(UserError, match=reason):
        load_image(uri)


def test_data_uri_size_is_capped():
    with pytest.raises(UserError, match="over 1 MiB"):
        parse_data_uri("data:;base64," + "A" * 3_000_000, max_bytes=2**20)
    with pytest.raises(UserError, match="over 1 MiB"):
        parse_data_uri("data:;base64," + "A" * 1_500_000, max_bytes=2**20)
