"""torch.compile for what runs with many kinds of inputs and in many threads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

# Resolutions, numbers of rows, with and without gradients, … After 8 kinds PyTorch runs a function as it is, silently.
RECOMPILE_LIMIT = 64

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, dynamic: bool | None = None) -> Function:
    """torch.compile(function) for up to `RECOMPILE_LIMIT` kinds of inputs.

    dynamic: True compiles for all shapes at once, None for the first shape and, when another comes, for all others.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # PyTorch's setting belongs to one thread
        return torch.compile(function, dynamic=dynamic, recompile_limit=RECOMPILE_LIMIT)
    from torch._dynamo import config  # PyTorch's compiler, which takes seconds to import

    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(function, dynamic=dynamic)


@cache
def compiler_problem(device: torch.device) -> str | None:
    """Why PyTorch's compiler does not work here, in one line; None where it does."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        return next(line for line in str(error).splitlines() if line.strip())
    return None
