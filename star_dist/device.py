"""The device that a command was told to use, or that a rank has."""

from __future__ import annotations

import torch

from star_dist.errors import UserError, first_line
from star_dist.process import ProcessInfo, check_gpus_are_there


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of a name; null is a GPU if there is one.

    Raises:
        UserError: there is no such device here. Unavailable: none was named, and the GPUs that this process was given
            cannot be used.
    """
    if name is None:
        check_gpus_are_there(torch.cuda.is_available())
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"there is no device {name}: {first_line(error)}") from None
    return device


def rank_device(process: ProcessInfo) -> torch.device:
    """A rank's GPU, which becomes the current one; the CPU on a machine without GPUs.

    Raises:
        Unavailable: this process was given GPUs and can use none.
        UserError: it sees fewer GPUs than there are ranks on its node.
    """
    check_gpus_are_there(torch.cuda.is_available())
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if process.local_rank >= (count := torch.cuda.device_count()):
        raise UserError(
            f"rank {process.rank} is number {process.local_rank} on its node, counted from 0, but sees {count} GPU(s); "
            f"start one rank per GPU, and let each see all GPUs of its node (srun --gpu-bind=none)"
        )
    torch.cuda.set_device(process.local_rank)
    return torch.device("cuda", process.local_rank)
