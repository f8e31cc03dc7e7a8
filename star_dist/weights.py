"""Reading weight files and comparing them with the module they are meant for."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from star_dist.errors import UserError

MAX_SHOWN_PROBLEMS = 5


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from `.safetensors`, or from a PyTorch file that is read with weights_only.

    Raises:
        UserError: no such file, a damaged one, or one that holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is no file of tensors, or a damaged one: {reason}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} does not hold a dictionary of tensors")
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
