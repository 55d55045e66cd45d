import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, features

from spo.data.images import MAX_PIXELS, decode_image, picture_size
from spo.data.rows import RowError

RED = (200, 30, 30)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).convert(mode)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_pictures_come_back_exactly(kind: str) -> None:
    assert np.array_equal(np.asarray(decode_image(encode(noise(), kind))), np.asarray(noise()))


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("P", "PNG")])
def test_every_mode_becomes_rgb(mode: str, kind: str) -> None:
    image = decode_image(encode(noise(mode), kind))
    assert (image.mode, image.size) == ("RGB", (48, 32))


def test_cmyk_keeps_its_colour() -> None:
    image = decode_image(encode(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 6


def test_sixteen_bits_keep_their_upper_eight() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    image = decode_image(encode(Image.fromarray(values)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (*RED, 0)), ("LA", (30, 0))])
def test_alpha_is_laid_over_white(mode: str, colour: tuple[int, ...]) -> None:
    assert decode_image(encode(Image.new(mode, (4, 4), colour))).getpixel((0, 0)) == (255, 255, 255)


def test_half_transparent_red_over_white_is_pink() -> None:
    image = decode_image(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 128))))
    assert image.getpixel((0, 0)) == (255, 127, 127)


def test_a_transparent_palette_colour_is_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 30, 30])
    assert decode_image(encode(image, "PNG", transparency=1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read() -> None:
    image = decode_image(encode(Image.new("RGB", (16, 16), RED), "AVIF", quality=95))
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 8


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    for kind in ("GIF", "WEBP"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert np.abs(np.asarray(decode_image(data)).astype(int) - RED).max() <= 8


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode_image(encode(noise(), "JPEG", exif=exif)).size == (32, 48)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_a_truncated_picture_is_refused(kind: str, share: float) -> None:
    data = encode(noise(), kind)
    with pytest.raises(RowError) as raised:
        decode_image(data[: int(share * len(data))])
    assert raised.value.reason == "image broken"


def test_a_png_with_a_flipped_byte_is_refused() -> None:
    data = bytearray(encode(noise()))
    data[len(data) // 2] ^= 1
    with pytest.raises(RowError, match=r"^image broken"):
        decode_image(bytes(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image empty"),
        (None, "image missing"),
        ("photo.png", "image missing"),
        (b"<html>", "image broken"),
        (b"\xff\x0a\x00\x01", "JPEG XL is not read"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL is not read"),
        (b"\0\0\0\x18ftypheic\0\0", "HEIC is not read"),
        (b"<?xml version='1.0'?>\n<svg/>", "SVG is not read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "image broken"),
        (png_header(0, 5), "image broken"),
        (png_header(8001, 8000), "image too large"),
        (png_header(10_000, 10_000), "image too large"),  # where Pillow warns
        (png_header(60_000, 60_000), "image too large"),  # where Pillow raises
        (encode(Image.new("F", (4, 4)), "TIFF"), "image broken"),
    ],
)
def test_what_is_no_sane_picture_is_refused(data: object, reason: str) -> None:
    with pytest.raises(RowError) as raised:
        decode_image(data)
    assert raised.value.reason == reason


def test_the_pixel_limit_is_inclusive() -> None:
    assert MAX_PIXELS == 8000 * 8000
    with pytest.raises(RowError, match=r"^image broken"):  # it passes the limit and has no pixels
        decode_image(png_header(8000, 8000))


def test_a_bomb_leaves_no_warning_in_a_plain_process() -> None:
    code = (
        "import sys; from spo.data.images import decode_image; from spo.data.rows import RowError\n"
        "try: decode_image(sys.stdin.buffer.read())\n"
        "except RowError as error: print(error.reason)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=png_header(10_000, 10_000), capture_output=True)
    assert (done.stdout.strip(), done.stderr) == (b"image too large", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_from_the_head_is_that_of_the_decoded_picture(kind: str, orientation: int) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {} if kind == "GIF" else {"exif": exif}
    Image.new("RGB", (30, 20)).save(file, kind, **options)
    assert picture_size(file.getvalue()) == decode_image(file.getvalue()).size[::-1]


def test_the_size_of_a_png_is_known_without_decoding_it(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda _: pytest.fail("decoded"))
    assert picture_size(file.getvalue()) == (20, 30)
