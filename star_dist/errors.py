"""What ends a command with one line and never with a traceback: a user's mistake, or a wish to end."""

LONGEST_LINE = 1000  # letters; transformers lists hundreds of names in one


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line of our own message; its type where it says nothing."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + "…"


class UserError(ValueError):
    """A mistake in input, configuration or files; the message says what was found and what to change.

    exit_code: how a command ends with it (see `star_dist.cli`).
    """

    exit_code = 2


class Unavailable(UserError):
    """Storage, network, another node or a lock is not to be had now: the same command may succeed later."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h


class RunEnded(Exception):
    """A run that was asked to end did, after saving where it can go on; `exit_code` tells its job what to do next."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
