"""What errors of the Hugging Face libraries mean for a command."""

from __future__ import annotations

from star_dist.errors import Unavailable, UserError


def hub_error(error: BaseException, message: str) -> UserError:
    """The error to raise in place of what loading from the hub or a folder ended in: `Unavailable` where the hub, which
    was asked, did not answer.
    """
    return (Unavailable if _did_not_answer(error) else UserError)(message)


def _did_not_answer(error: BaseException | None) -> bool:
    from huggingface_hub import constants, errors

    while error is not None and not isinstance(error, errors.LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None and not constants.HF_HUB_OFFLINE
