import io
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from influencespace.data.images import (
    DRAFT,
    HELD_SQUARES,
    MAX_SCANS,
    RejectedImage,
    decode_image,
    decoding_bytes,
    escapes,
    has_more_scans,
    read_image_bytes,
    sharpness,
)
from influencespace.data.schema import ImageRef

Encode = Callable[..., bytes]


def png_bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A valid one-bit PNG of enormous size: zeros compress to a thousandth, so the file stays small."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return len(data).to_bytes(4) + kind + data + checksum.to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([1, 0, 0, 0, 0])
    compressor = zlib.compressobj(9)
    row = bytes(1 + -(-width // 8))
    pixels = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_images_of_the_web_decode_to_rgb(encoded_image: Encode, kind: str) -> None:
    image = decode_image(encoded_image(kind=kind))
    assert image.mode == "RGB"
    assert image.size == (16, 12)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (5, 4)).save(path)
    assert decode_image(path.read_bytes()).mode == "RGB"


def test_a_transparent_palette_is_decoded_without_a_warning() -> None:
    image = Image.new("P", (4, 4), 2)
    image.putpalette([0, 0, 0, 1, 1, 1, 9, 8, 7])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([0, 0, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (9, 8, 7)


def test_sixteen_bits_of_grey_keep_their_shade() -> None:
    buffer = io.BytesIO()
    Image.new("I;16", (4, 4), 0x8000).save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"<html>not found</html>" * 50, b"\xff\xd8\xff", b"%!PS-Adobe"]
)
def test_what_is_no_image_is_rejected(data: bytes) -> None:
    with pytest.raises(RejectedImage, match="not a readable image"):
        decode_image(data)


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "PPM", "ICO"])
def test_formats_of_other_programs_are_rejected(kind: str) -> None:
    """Pillow gives EPS to Ghostscript, which runs it; the others have decoders that the web does not need."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 9, 9)).save(buffer, kind)
    assert Image.open(io.BytesIO(buffer.getvalue())).format == kind
    with pytest.raises(RejectedImage, match="not a readable image"):
        decode_image(buffer.getvalue())


def test_a_bomb_is_rejected_from_its_header() -> None:
    bomb = png_bomb()
    assert len(bomb) < 2**20
    with pytest.raises(RejectedImage, match="too large"):
        decode_image(bomb)


def test_the_limit_of_pixels_is_checked_before_decoding(
    encoded_image: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = encoded_image()

    def refuse(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(Image.Image, "load", refuse)
    with pytest.raises(RejectedImage, match="9000 x 8000 pixels"):
        decode_image(png_bomb(9000, 8000))
    with pytest.raises(RejectedImage, match="16 x 12 pixels"):
        decode_image(small, max_pixels=16 * 12 - 1)


@pytest.mark.parametrize(
    ("kind", "how"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {"lossless": True})],
)
@given(data=st.data())
def test_a_cut_image_is_rejected_or_whole(
    encoded_image: Encode, kind: str, how: dict[str, bool], data: st.DataObject
) -> None:
    whole = encoded_image(3, (64, 48), kind, **how)
    pixels = np.asarray(decode_image(whole))
    cut = data.draw(st.integers(0, len(whole) - 1))
    try:
        image = decode_image(whole[:cut])
    except RejectedImage:
        return
    assert np.array_equal(np.asarray(image), pixels)


@given(st.binary(max_size=300), st.integers(0, 300))
def test_hostile_bytes_never_raise_anything_else(encoded_image: Encode, garbage: bytes, place: int) -> None:
    good = encoded_image(kind="PNG")
    for data in (garbage, good[:place] + garbage + good[place + len(garbage) :]):
        with suppress(RejectedImage):
            assert decode_image(data).mode == "RGB"


def test_a_range_read_gives_the_bytes_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"0123456789")
    assert read_image_bytes(ImageRef(path=str(path), offset=3, length=4)) == b"3456"
    assert read_image_bytes(ImageRef(path=str(path))) == b"0123456789"
    with pytest.raises(RejectedImage, match="has it changed"):
        read_image_bytes(ImageRef(path=str(path), offset=8, length=4))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg"])
def test_names_that_leave_their_folder(name: str) -> None:
    assert escapes(name)


@pytest.mark.parametrize("name", ["x.jpg", "a/b/x.jpg", "..x.jpg", "a..b/x.jpg", ""])
def test_names_that_stay(name: str) -> None:
    assert not escapes(name)


@given(seed=st.integers(0, 2**31), width=st.integers(130, 300), height=st.integers(130, 300))
def test_what_is_out_of_focus_or_enlarged_is_less_sharp(seed: int, width: int, height: int) -> None:
    cells = np.random.default_rng(seed).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    picture = Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST)
    blurred = picture.filter(ImageFilter.GaussianBlur(8))
    thumbnail = picture.resize((12, 12)).resize((width, height))
    assert sharpness(blurred) < sharpness(picture) - 1
    assert sharpness(thumbnail) < sharpness(picture) - 1
    twice = picture.resize((2 * width, 2 * height), Image.Resampling.NEAREST)
    assert abs(sharpness(twice) - sharpness(picture)) < 0.5


@given(seed=st.integers(0, 2**31), blur=st.floats(0, 8))
def test_sharpness_is_exactly_the_variance_of_the_laplacian(seed: int, blur: float) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (128, 128)).astype(np.uint8)
    picture = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(blur))
    grey = np.asarray(picture).astype(np.int64)
    inner = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    mean, square = int(inner.sum()) / inner.size, int((inner * inner).sum()) / inner.size
    assert sharpness(picture.convert("RGB")) == float(np.log(square - mean**2 + 1e-3))


def test_a_picture_of_one_colour_has_the_least_sharpness() -> None:
    assert sharpness(Image.new("RGB", (40, 30), "red")) == pytest.approx(np.log(1e-3))


def photograph(width: int, height: int, kind: str = "JPEG", mode: str = "RGB", **how: Any) -> bytes:
    """Smooth noise of any size, encoded."""
    cells = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


KINDS = [
    ("JPEG", "RGB"),
    ("JPEG", "L"),
    ("JPEG", "CMYK"),
    ("PNG", "RGB"),
    ("PNG", "RGBA"),
    ("PNG", "P"),
    ("PNG", "LA"),
    ("PNG", "1"),
    ("PNG", "I;16"),
    ("WEBP", "RGB"),
    ("GIF", "P"),
    ("BMP", "RGB"),
]


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_a_picture_near_the_encoders_size_is_the_full_one_made_small(kind: str, mode: str) -> None:
    data = photograph(901, 703, kind, mode)
    full, near = decode_image(data), decode_image(data, near=32)
    assert near.mode == "RGB"
    assert min(near.size) >= DRAFT * 32
    assert near.info["full"] == full.size == (901, 703)
    box = (0, 0, 901 / near.info["scale"], 703 / near.info["scale"])
    expected = full.resize((64, 48), Image.Resampling.BILINEAR)
    pixels = near.resize((64, 48), Image.Resampling.BILINEAR, box)
    assert np.abs(np.asarray(pixels, float) - np.asarray(expected, float)).mean() < 1.5
    assert abs(sharpness(near) - sharpness(full)) < 0.5


@given(width=st.integers(1, 2000), height=st.integers(1, 2000), near=st.integers(1, 64))
@settings(deadline=None)
def test_what_is_held_of_a_picture_is_bounded(width: int, height: int, near: int) -> None:
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), "red").save(buffer, kind)
        picture = decode_image(buffer.getvalue(), near=near)
        assert picture.width * picture.height <= HELD_SQUARES * (DRAFT * near) ** 2
        assert 4 * picture.width * picture.height <= decoding_bytes(1, near)[1]
        assert min(picture.size) >= min(width, height, near)
        assert picture.getpixel((0, 0))[0] >= 250  # type: ignore[index]
        if min(width, height) <= DRAFT * near and width * height <= HELD_SQUARES * (DRAFT * near) ** 2:
            assert picture.size == (width, height)
            assert picture.info == {}


def test_no_more_than_one_band_is_converted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 24 megapixel PNG with alpha takes 4 bytes a pixel, and never as many again for its conversion."""
    data, sizes, convert = photograph(1200, 900, "PNG", "RGBA"), [], Image.Image.convert

    def spy(image: Image.Image, mode: str) -> Image.Image:
        sizes.append(image.width * image.height)
        return convert(image, mode)

    monkeypatch.setattr(Image.Image, "convert", spy)
    monkeypatch.setattr("influencespace.data.images.BAND_PIXELS", 50_000)
    decode_image(data, near=50)
    assert len(sizes) > 10
    assert max(sizes) <= 50_000


def many_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan is there many times."""
    data = photograph(64, 48, progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + (scans - data.count(b"\xff\xda")) * last + data[-2:]


def test_a_jpeg_of_very_many_scans_is_rejected_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_image(many_scans(MAX_SCANS)).size == (64, 48)
    hostile = many_scans(300)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("pixels were decoded"))
    for near in (None, 8):
        with pytest.raises(RejectedImage, match="more than 32 scans"):
            decode_image(hostile, near=near)


@pytest.mark.parametrize("how", [{}, {"progressive": True}])
def test_what_looks_like_a_scan_is_counted_only_where_scans_are(how: dict[str, bool]) -> None:
    thumbnails = b"Exif\0\0" + 100 * (b"\xff\xda" + bytes(10))
    data = photograph(64, 48, exif=thumbnails, **how) + 100 * b"\xff\xda"
    assert not has_more_scans(data, MAX_SCANS)
    assert decode_image(data, near=8).mode == "RGB"
    assert not has_more_scans(100 * b"\xff\xda", MAX_SCANS)


def test_what_a_file_says_beside_its_pixels_is_not_kept() -> None:
    data = photograph(64, 48, exif=b"Exif\0\0" + bytes(60_000))
    assert decode_image(data, near=8).info.keys() <= {"full", "scale"}
    assert decode_image(data, near=64).info == {}
