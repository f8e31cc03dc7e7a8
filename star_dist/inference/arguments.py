"""Arguments that all commands share which draw with a model. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from star_dist.errors import UserError

if TYPE_CHECKING:
    from star_dist.inference.pipeline import StarPipeline

MAX_SEED = 2**63 - 1
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
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


def add_seed_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture; it counts up (default 0)")


def check_seeds(first: int, count: int) -> None:
    """Raises:
    UserError: a seed of `count` that count up from the first is no seed of PyTorch's generators.
    """
    if not 0 <= first <= MAX_SEED - count + 1:
        raise UserError(f"--seed must lie in 0..{MAX_SEED - count + 1} for {count} pictures, got {first}")


def check_amounts(count: int, batch: int) -> None:
    """Raises:
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
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--out {path} must end in .png or .jpg")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file, in it or elsewhere")
    return path
