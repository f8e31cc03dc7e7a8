"""The grid that sets drawings beside a data set's pictures: which section a caption stands in, and what it refuses."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from star_dist.errors import UserError
from star_dist.inference import seen_grid
from star_dist.inference.grid import GridSection, draw_grid, grid_size
from star_dist.inference.options import SamplingOptions
from star_dist.inference.pipeline import StarPipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipeline(inference_folder: Path) -> StarPipeline:
    return StarPipeline.from_pretrained(inference_folder)


@pytest.fixture
def captions_of_sections(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Captions by the first word of their section's title, once a grid was drawn."""
    found: dict[str, list[str]] = {}

    def draw(sections: list[GridSection], columns: int) -> Image.Image:
        found.update({section.title.split()[0]: [label for _, label in section.cells] for section in sections})
        return draw_grid(sections, columns)

    monkeypatch.setattr(seen_grid, "draw_grid", draw)
    return found


def test_a_caption_of_both_splits_was_seen(
    pipeline: StarPipeline, dataset_folder: Path, captions_of_sections: dict[str, list[str]]
) -> None:
    """Pictures are held out, not captions: every caption here has some of its pictures in each split."""
    assert seen_grid.read_metadata(dataset_folder).splits["val"] > 0
    captions = ["red heart", "green face", "a new one"]
    grid = seen_grid.draw_seen_grid(pipeline, dataset_folder, captions, SamplingOptions(), 1, 2, 0)
    assert captions_of_sections == {"Seen": ["red heart", "green face"], "New": ["a new one"]}
    assert grid.size == grid_size([2, 1], 2, columns=2)


def test_a_grid_that_is_too_large_is_refused_before_it_is_drawn(
    pipeline: StarPipeline, dataset_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("something was drawn")

    captions = ["red heart", "a new one"]
    draw = lambda longest: seen_grid.draw_seen_grid(
        pipeline, dataset_folder, captions, SamplingOptions(), 1, 1, 0, longest
    )
    height = draw(None).height
    assert draw(height).height == height
    monkeypatch.setattr(StarPipeline, "__call__", never)
    with pytest.raises(UserError, match=rf"would have \d+ x {height} pixels, a side may have {height - 1}; give fewer"):
        draw(height - 1)


def test_a_new_caption_is_not_cut(pipeline: StarPipeline, dataset_folder: Path) -> None:
    with pytest.raises(UserError, match="a prompt has 12 tokens, the model takes 8; shorten 'a red red"):
        seen_grid.draw_seen_grid(pipeline, dataset_folder, ["a" + " red" * 9], SamplingOptions(), 1, 1, 0)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("captions.txt/grid.png", "error: {folder}/captions.txt: "),
        ("folder.png", "error: --out {folder}/folder.png is a folder; name a file"),
    ],
)
def test_an_out_that_cannot_be_is_found_before_anything_is_drawn(
    inference_folder: Path, dataset_folder: Path, tmp_path: Path, run_launcher: Callable[..., str], out: str, said: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    captions = tmp_path / "captions.txt"
    captions.write_text("red heart\n")
    found = run_launcher(
        "sample_grid.py", str(inference_folder), "--data", str(dataset_folder), "--captions", str(captions),
        "--out", str(tmp_path / out),
    )  # fmt: skip
    assert said.format(folder=tmp_path) in found


@pytest.fixture
def run_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in this process where drawing is a failure; gives what it said on stderr."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was drawn")

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(StarPipeline, "sample", never)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "launcher" / name), run_name="__main__")
        assert ended.value.code
        return capsys.readouterr().err

    return run
