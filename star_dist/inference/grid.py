"""Labelled grids of pictures for people to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 13
LINE_HEIGHT = 16
MARGIN = 8
MAX_LABEL_LINES = 2


@dataclass(frozen=True)
class GridSection:
    """A title over cells; each cell is a few pictures side by side over one label."""

    title: str
    cells: Sequence[tuple[Sequence[Image.Image], str]]


def draw_grid(sections: Sequence[GridSection], columns: int, picture_side: int = 96) -> Image.Image:
    """Draws all sections below one another, `columns` cells a row; small pictures are enlarged to `picture_side`."""
    font = ImageFont.load_default(FONT_SIZE)
    pictures_per_cell = max(len(pictures) for section in sections for pictures, _ in section.cells)
    cell_width = pictures_per_cell * picture_side + MARGIN
    cell_height = picture_side + MAX_LABEL_LINES * LINE_HEIGHT + MARGIN
    title_height = 2 * LINE_HEIGHT
    rows = [-(-len(section.cells) // columns) for section in sections]
    height = sum(title_height + count * cell_height for count in rows) + MARGIN
    canvas = Image.new("RGB", (columns * cell_width + MARGIN, height), "white")
    pen = ImageDraw.Draw(canvas)
    top = MARGIN
    for section, count in zip(sections, rows):
        pen.text((MARGIN, top), section.title, fill="black", font=ImageFont.load_default(FONT_SIZE + 3))
        top += title_height
        for i, (pictures, label) in enumerate(section.cells):
            left, cell_top = MARGIN + i % columns * cell_width, top + i // columns * cell_height
            for j, picture in enumerate(pictures):
                enlarged = picture.resize((picture_side, picture_side), Image.Resampling.BICUBIC)
                canvas.paste(enlarged, (left + j * picture_side, cell_top))
            letters = max(8, (cell_width - MARGIN) // (FONT_SIZE // 2))
            lines = textwrap.wrap(label, letters, max_lines=MAX_LABEL_LINES, placeholder="…")
            pen.multiline_text(
                (left, cell_top + picture_side + 2), "\n".join(lines), fill="#333333", font=font, spacing=2
            )
        top += count * cell_height
    return canvas
