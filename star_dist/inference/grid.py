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
PICTURE_SIDE = 96
TITLE_HEIGHT = 2 * LINE_HEIGHT


@dataclass(frozen=True)
class GridSection:
    """A title over cells; each cell is a few pictures side by side over one label."""

    title: str
    cells: Sequence[tuple[Sequence[Image.Image], str]]


def cell_size(pictures_per_cell: int) -> tuple[int, int]:
    """Width and height of a cell with its label and the margin after it, in pixels."""
    return pictures_per_cell * PICTURE_SIDE + MARGIN, PICTURE_SIDE + MAX_LABEL_LINES * LINE_HEIGHT + MARGIN


def grid_size(cells: Sequence[int], pictures_per_cell: int, columns: int) -> tuple[int, int]:
    """Width and height of a grid in pixels; cells: how many each section has."""
    cell_width, cell_height = cell_size(pictures_per_cell)
    height = sum(TITLE_HEIGHT + -(-count // columns) * cell_height for count in cells) + MARGIN
    return columns * cell_width + MARGIN, height


def draw_grid(sections: Sequence[GridSection], columns: int) -> Image.Image:
    """Draws all sections below one another, `columns` cells a row; pictures are resized to `PICTURE_SIDE`."""
    font = ImageFont.load_default(FONT_SIZE)
    pictures_per_cell = max(len(pictures) for section in sections for pictures, _ in section.cells)
    cell_width, cell_height = cell_size(pictures_per_cell)
    cells = [len(section.cells) for section in sections]
    canvas = Image.new("RGB", grid_size(cells, pictures_per_cell, columns), "white")
    pen = ImageDraw.Draw(canvas)
    top = MARGIN
    for section in sections:
        pen.text((MARGIN, top), section.title, fill="black", font=ImageFont.load_default(FONT_SIZE + 3))
        top += TITLE_HEIGHT
        for i, (pictures, label) in enumerate(section.cells):
            left, cell_top = MARGIN + i % columns * cell_width, top + i // columns * cell_height
            for j, picture in enumerate(pictures):
                enlarged = picture.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)
                canvas.paste(enlarged, (left + j * PICTURE_SIDE, cell_top))
            letters = max(8, (cell_width - MARGIN) // (FONT_SIZE // 2))
            lines = textwrap.wrap(label, letters, max_lines=MAX_LABEL_LINES, placeholder="…")
            pen.multiline_text(
                (left, cell_top + PICTURE_SIDE + 2), "\n".join(lines), fill="#333333", font=font, spacing=2
            )
        top += -(-len(section.cells) // columns) * cell_height
    return canvas
