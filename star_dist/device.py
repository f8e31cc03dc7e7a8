"""The device that a command was told to use."""

from __future__ import annotations

import torch

from star_dist.errors import UserError


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of a name; null is a GPU if there is one.

    Raises:
        UserError: there is no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"there is no device {name or 'cuda'}: {str(error).splitlines()[0]}") from None
    return device
