"""Pictures from untrusted bytes."""

import io
import re
import threading
import warnings
from contextlib import nullcontext

import numpy as np
from PIL import ExifTags, Image, ImageOps, features

from spo.data.rows import RowError

PLAIN = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORMATS = (*PLAIN, "AVIF") if features.check("avif") else PLAIN  # only these: some of Pillow's readers start programs
SIGNATURES = {  # of formats that people have and that Pillow does not read
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "HEIC": rb"....ftyp(hei|hev|mif1)",
    "AVIF": rb"....ftypavi",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?<svg",
}
TURNED = (5, 6, 7, 8)  # EXIF's orientations that swap height and width
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20
LARGE_PIXELS = 16_000_000  # from this size on, one picture is decoded at a time, in all threads together

# Pillow only warns of a picture that unpacks to far too much memory; here it is an error.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

_ONE_LARGE = threading.Lock()


def decode_image(data: object) -> Image.Image:
    """The decoded picture, upright and as RGB.

    An animation gives its first frame, transparent pixels become white, and 16-bit grey keeps its upper 8 bits.
    RowError (a DataError) unless `data` is the bytes of an undamaged picture of FORMATS within MAX_PIXELS.
    """
    if not isinstance(data, bytes):
        raise RowError("image missing", data)
    if not data:
        raise RowError("image empty")
    if len(data) > MAX_BYTES:
        raise RowError("image too large", f"{len(data)} bytes, at most {MAX_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.verify()  # checksums, where the format has them
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise RowError("image too large", f"{width} x {height} pixels, at most {MAX_PIXELS}")
            with _ONE_LARGE if width * height > LARGE_PIXELS else nullcontext():
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except RowError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise RowError("image too large", str(error)) from None
    except Image.UnidentifiedImageError:
        raise _unknown(data) from None
    except Exception as error:  # on broken bytes Pillow's readers raise nearly anything
        raise RowError("image broken", f"{type(error).__name__}: {error}") from None


def picture_size(data: bytes) -> tuple[int, int]:
    """Height and width of an undamaged picture when it is upright; only its head is read.

    A PNG that says after its pixels how it is turned counts as upright.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode it to look further
            return height, width
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in TURNED
    return (width, height) if turned else (height, width)


def _unknown(data: bytes) -> RowError:
    """The reason for a format that is not read; it is named if it is known."""
    for name, signature in SIGNATURES.items():
        if re.match(signature, data[:200], re.DOTALL):
            return RowError(f"{name} is not read", f"convert it to one of {', '.join(FORMATS)}")
    return RowError("image broken", f"no {', '.join(FORMATS)}: starts with {data[:12]!r}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise RowError("image broken", "floating-point pixels have no white point; save it with 8 bits")
    if image.mode.startswith("I"):  # 16 bits, perhaps held in 32
        pixels = np.asarray(image)
        if pixels.dtype.itemsize > 2:
            pixels = pixels.clip(0, 65535).astype(np.uint16)
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
