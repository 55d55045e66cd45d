"""PNG files that record how they were made, and sheets of pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from spo.runtime.files import atomic_path

GAP, MARGIN = 8, 16  # pixels
INK, PAPER = "#17191c", "#ffffff"
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_picture(image: Tensor) -> Image.Image:
    """A picture of an image (3, H, W) in [0, 1]."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_png(picture: Image.Image, path: Path, facts: Mapping[str, object]) -> None:
    """Write a PNG with `facts` as its text fields."""
    info = PngInfo()
    for name, value in facts.items():
        info.add_itxt(name, str(value))
    with atomic_path(path) as temporary:
        picture.save(temporary, pnginfo=info)


def enlarged(picture: Image.Image, least: int) -> Image.Image:
    """A picture enlarged by a whole factor to at least `least` pixels of width; its pixels stay sharp."""
    scale = max(1, -(-least // picture.width))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def of_width(picture: Image.Image, least: int, most: int) -> Image.Image:
    """A picture enlarged to at least `least` pixels of width, or reduced to at most `most`."""
    if picture.width > most:
        return picture.resize((most, max(1, round(picture.height * most / picture.width))), Image.Resampling.LANCZOS)
    return enlarged(picture, least)


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row, on white."""
    gap = 4
    tiles = [enlarged(picture, 96) for picture in pictures]
    width, height = tiles[0].size
    sheet = Image.new("RGB", (len(tiles) * (width + gap) - gap, height), PAPER)
    for x, picture in enumerate(tiles):
        sheet.paste(picture, (x * (width + gap), 0))
    return sheet


def row_sheet(rows: Mapping[str, Sequence[Image.Image]], title: str, captions: Sequence[str]) -> Image.Image:
    """A sheet with a title, a row of pictures of one size for each name, and a caption above each column."""
    font, small = ImageFont.load_default(18), ImageFont.load_default(14)
    tiles = {name: [of_width(picture, 112, 256) for picture in pictures] for name, pictures in rows.items()}
    width, height = next(iter(tiles.values()))[0].size
    left = MARGIN + round(max(font.getlength(name) for name in tiles)) + MARGIN
    size = (left + len(captions) * (width + GAP) - GAP + MARGIN, len(tiles) * (height + GAP) - GAP + MARGIN)
    sheet, draw, top = _titled(title, small, size)
    for x, caption in enumerate(captions):
        draw.text((left + x * (width + GAP) + width / 2, top - 22), caption, INK, small, anchor="ma")
    for y, (name, pictures) in enumerate(tiles.items()):
        draw.text((MARGIN, top + y * (height + GAP) + height / 2), name, INK, font, anchor="lm")
        for x, picture in enumerate(pictures):
            sheet.paste(picture, (left + x * (width + GAP), top + y * (height + GAP)))
    return sheet


def labelled_sheet(title: str, columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str]) -> Image.Image:
    """A sheet with a wrapped title, a column of pictures for each name and a row for each label in `rows`."""
    font, small = ImageFont.load_default(18), ImageFont.load_default(14)
    tiles = {name: [enlarged(picture, 256) for picture in pictures] for name, pictures in columns.items()}
    tile = next(iter(tiles.values()))[0]
    size = (2 * MARGIN + len(tiles) * (tile.width + GAP) - GAP, len(rows) * (tile.height + 30) + MARGIN - 8)
    sheet, draw, top = _titled(title, font, size)
    for x, (name, pictures) in enumerate(tiles.items()):
        left = MARGIN + x * (tile.width + GAP)
        draw.text((left, top - 26), _fitting(name, font, tile.width), INK, font)
        for y, picture in enumerate(pictures):
            sheet.paste(picture, (left, top + y * (tile.height + 30)))
    for y, label in enumerate(rows):
        draw.text((MARGIN, top + y * (tile.height + 30) + tile.height + 4), label, INK, small)
    return sheet


def _titled(title: str, font: Font, size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """A sheet with a wrapped title and a line of heads above a body of `size`; its pen; and where the body begins."""
    width, height = size
    lines = _wrapped(title, font, width - 2 * MARGIN)
    top = MARGIN + 26 * len(lines) + 30
    sheet = Image.new("RGB", (width, top + height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + 26 * i), line, INK, font)
    return sheet, draw, top


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Lines of at most `width` pixels; a longer word has its own line and is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_fitting(line, font, width) for line in lines] or [""]


def _fitting(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
