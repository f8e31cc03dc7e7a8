"""Arguments that all commands share which draw with a model. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_dist.cli import check_is_no_folder
from star_dist.errors import UserError
from star_dist.inference.options import SamplingOptions

if TYPE_CHECKING:
    from star_dist.inference.pipeline import StarPipeline

MAX_SEED = 2**63 - 1
OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg")
JPEG_LONGEST_SIDE = 65500  # pixels that Pillow's JPEGs can have


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how it runs, read by `load_pipeline`."""
    parser.add_argument(
        "model", metavar="DIR", help="inference folder (launcher/export.py writes one) or Hugging Face id"
    )
    group = parser.add_argument_group("running")
    group.add_argument("--device", help="cuda, cuda:1, cpu … (default: a GPU if there is one)")
    group.add_argument("--dtype", choices=("bf16", "fp32"), help="of the transformer (default: bf16 on a GPU)")
    group.add_argument("--no-graphs", action="store_true", help="no CUDA graphs, which a GPU has by default")
    group.add_argument("--compile", action="store_true", help="torch.compile; the first drawing takes longer then")


def load_pipeline(arguments: argparse.Namespace) -> StarPipeline:
    """What was typed after `add_model_arguments`.

    Raises:
        UserError: no such model or device.
    """
    from star_dist.export import DTYPES
    from star_dist.inference.pipeline import StarPipeline

    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    pipeline = StarPipeline.from_pretrained(arguments.model, arguments.device, dtype)
    if arguments.no_graphs or arguments.compile:
        pipeline.accelerate(False if arguments.no_graphs else None, arguments.compile)
    return pipeline


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of drawing, read by `sampling_options`; A,B,… stands for one value per scale, coarse to fine."""
    group = parser.add_argument_group("drawing", "N may be one value, or one for each scale: A,B,… coarse to fine")
    group.add_argument("--guidance", type=float, default=4.0, help="at the last scale, from 0 at the first (default 4)")
    group.add_argument("--guidance-by-scale", metavar="A,B,…", help="strength at each scale in place of that ramp")
    group.add_argument(
        "--top-k", default="0", metavar="N", help="keep the N likeliest tokens; 1 is greedy, 0 keeps all"
    )
    group.add_argument("--top-p", default="0", metavar="N", help="keep the likeliest tokens that hold N; 0 keeps all")
    group.add_argument("--temperature", default="1", metavar="N", help="divides the logits (default 1)")
    group.add_argument(
        "--smoothing", default="0", metavar="N", help="mix the kept codes, 0 for not (VAR: 0.27 to 0.005)"
    )


def sampling_options(arguments: argparse.Namespace) -> SamplingOptions:
    """What was typed after `add_sampling_arguments`.

    Raises:
        UserError: no number, or one out of range.
    """
    kinds = {"top_k": int, "top_p": float, "temperature": float, "smoothing": float}
    values = {
        name: _parse(f"--{name.replace('_', '-')}", getattr(arguments, name), kind) for name, kind in kinds.items()
    }
    options: dict[str, Any] = {name: found[0] if len(found) == 1 else found for name, found in values.items()}
    if arguments.guidance_by_scale is not None:
        options["guidance_by_scale"] = _parse("--guidance-by-scale", arguments.guidance_by_scale, float)
    return SamplingOptions(arguments.guidance, **options)


def add_seed_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture; it counts up (default 0)")


def check_seeds(first: int, count: int) -> None:
    """Whether PyTorch's generators take all seeds that count up from the first.

    Raises:
        UserError: they do not.
    """
    if not 0 <= first <= MAX_SEED - count + 1:
        raise UserError(f"--seed must lie in 0..{MAX_SEED - count + 1} for {count} pictures, got {first}")


def check_amounts(count: int, batch: int) -> None:
    """Whether so many pictures can be drawn, so many at a time.

    Raises:
        UserError: --count or --batch is not positive.
    """
    if count < 1 or batch < 1:
        raise UserError(f"--count and --batch must be positive, got {count} and {batch}")


def numbered_paths(out: Path, count: int) -> list[Path]:
    """Where that many pictures go: one to `out` itself, several beside it with numbers from 0 on."""
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(count)]


def picture_path(out: str) -> Path:
    """Where --out says that a picture goes, checked before anything is drawn.

    Raises:
        UserError: it ends in no picture's suffix, or is a folder.
    """
    path = Path(out)
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        raise UserError(f"--out {path} must end in .png or .jpg")
    check_is_no_folder(path)
    return path


def _parse(flag: str, text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{flag} takes {what} separated by commas, got {text!r}") from None
