"""Reading and writing weight files, and comparing them with the module they are meant for."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from star_dist.errors import UserError, first_line
from star_dist.files import read_json_object

MAX_SHOWN_PROBLEMS = 5
MAX_SHARD_SIZE = "5GB"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WRITTEN_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust shows what the system said; safetensors is written in it


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from `.safetensors`, or from a PyTorch file that is read with weights_only.

    Raises:
        UserError: no such file, a damaged one, or one that holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of foreign pickle protocols; the error says enough
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # the readers check little: damaged files end in errors of any kind
        raise UserError(f"{path} is no file of tensors, or a damaged one: {first_line(error)}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} does not hold a dictionary of tensors")
    return weights


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes `model.safetensors`, or beyond `MAX_SHARD_SIZE` several files and an index, as Hugging Face names them.

    Raises:
        OSError: it cannot be written.
    """
    from huggingface_hub import save_torch_state_dict

    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    with writing(folder):
        save_torch_state_dict(contiguous, folder, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes weights to a path.

    Raises:
        OSError: naming the path, in place of what safetensors raises, and `torch.save` where the system refused.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        found = system_error(error)
        if found is not None and found.errno is not None:
            raise OSError(found.errno, os.strerror(found.errno), found.filename or str(path)) from None
        if isinstance(error, SafetensorError):
            raise OSError(f"{path}: {error}") from None
        raise


def system_error(error: Exception) -> OSError | None:
    """The system's error that an error of reading or writing weights is, or stands for; None where it is none."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, SafetensorError) and (said := OS_ERROR.search(str(error))):
        return OSError(int(said[1]), os.strerror(int(said[1])))
    # Of torch.save into an open file, which hides why it could not be written behind an error about positions.
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__
    return None


def read_weights_folder(folder: Path) -> dict[str, Tensor]:
    """What `write_weights` wrote.

    Raises:
        UserError: no weights there, damaged ones, or shards that are not those of the index.
    """
    index_path = folder / INDEX_FILE
    if not index_path.is_file():
        return read_weights(folder / WEIGHTS_FILE)
    files = read_json_object(index_path, f"{index_path} does not exist").get("weight_map")
    if not isinstance(files, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in files.values()
    ):
        raise UserError(f"{index_path} is damaged: it has no weight_map of names to files beside it")
    weights: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        found = read_weights(folder / file)
        expected = {name for name, holder in files.items() if holder == file}
        if found.keys() != expected:
            name = min(found.keys() ^ expected)
            raise UserError(f"{folder / file} does not hold what {INDEX_FILE} says: {name} differs")
        weights |= found
    return weights


def check_names_and_shapes(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Compares weights with the tensors of a module.

    Raises:
        UserError: naming missing and unknown names and wrong shapes.
    """
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        rest = len(problems) - MAX_SHOWN_PROBLEMS
        shown = "; ".join(problems[:MAX_SHOWN_PROBLEMS]) + (f"; and {rest} more" if rest > 0 else "")
        raise UserError(f"{source} does not fit: {shown}")
