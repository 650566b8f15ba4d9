import io
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from influencespace.data.images import RejectedImage, decode_image, escapes, read_image_bytes, sharpness
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
    assert abs(sharpness(picture.resize((2 * width, 2 * height))) - sharpness(picture)) < 0.5


def test_a_picture_of_one_colour_has_the_least_sharpness() -> None:
    assert sharpness(Image.new("RGB", (40, 30), "red")) == pytest.approx(np.log(1e-3))
