"""Whatever an image's bytes are, decoding gives an upright RGB picture of sane size or a reason."""

import io
import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spo.data import images
from spo.data.images import MAX_PIXELS, decode_image
from spo.data.rows import RowError
from tests.hostile.trying import assert_one_line, damaged, tries


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def originals() -> list[bytes]:
    """Small pictures of every kind that is taken: colours, depths, palettes, animations, rotations."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8))
    deep = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (12, 18), dtype=np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [noise, noise.rotate(90), noise.rotate(180)]
    return [
        *[encoded(noise, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")],
        encoded(noise.convert("CMYK"), "JPEG"),
        encoded(noise.convert("CMYK"), "TIFF"),
        encoded(noise.convert("LA"), "PNG"),
        encoded(noise.convert("P"), "PNG", transparency=3),
        encoded(deep, "PNG"),
        encoded(deep, "TIFF"),
        encoded(noise, "JPEG", exif=turned),
        encoded(noise, "JPEG", progressive=True),
        encoded(noise, "TIFF", compression="tiff_lzw"),
        *[encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("GIF", "WEBP", "PNG", "TIFF")],
    ]


ORIGINALS = originals()


def assert_decodes_or_explains(data: bytes) -> None:
    try:
        image = decode_image(data)
    except RowError as error:
        assert_one_line(error)
        return
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= MAX_PIXELS


@pytest.mark.parametrize("data", ORIGINALS)
def test_a_sound_picture_decodes(data: bytes) -> None:
    assert decode_image(data).mode == "RGB"


@tries(800)
@given(data=damaged(st.sampled_from(ORIGINALS)))
def test_a_damaged_picture(data: bytes) -> None:
    assert_decodes_or_explains(data)


@tries(100)
@given(head=st.sampled_from(ORIGINALS).map(lambda data: data[:16]), tail=st.binary(max_size=60))
def test_a_picture_that_is_a_head_alone(head: bytes, tail: bytes) -> None:
    assert_decodes_or_explains(head + tail)


def bomb(width: int, height: int) -> bytes:
    """A PNG of one colour, a thousand times as big as its file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_before_it_takes_memory() -> None:
    data = bomb(9000, 8000)  # 216 MB of pixels
    assert len(data) < 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(RowError, match="image too large"):
            decode_image(data)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_an_animation_of_many_frames_costs_one() -> None:
    frames = [Image.new("P", (64, 64), i % 7) for i in range(400)]
    assert decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).size == (64, 64)


@pytest.mark.parametrize("size", [2**31 - 1, 2**32 - 1])
def test_a_header_that_claims_the_largest_size(size: int) -> None:
    data = bytearray(ORIGINALS[0])
    data[16:24] = struct.pack(">II", size & 0xFFFFFFFF, size & 0xFFFFFFFF)
    assert_decodes_or_explains(bytes(data))


def test_sixteen_bits_take_no_more_than_a_few_bytes_a_pixel() -> None:
    side = 2000
    data = encoded(Image.fromarray(np.full((side, side), 40_000, dtype=np.uint16)), "PNG")
    tracemalloc.start()
    try:
        assert decode_image(data).getpixel((0, 0)) == (156, 156, 156)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * side**2


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    to_rgb, at_once, most = images._to_rgb, 0, 0

    def watched(image: Image.Image) -> Image.Image:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.02)
        at_once -= 1
        return to_rgb(image)

    monkeypatch.setattr(images, "_to_rgb", watched)
    monkeypatch.setattr(images, "LARGE_PIXELS", 99)
    data = encoded(Image.new("RGB", (10, 10)), "PNG")
    with ThreadPoolExecutor(4) as threads:
        assert len(list(threads.map(decode_image, [data] * 8))) == 8
    assert most == 1
