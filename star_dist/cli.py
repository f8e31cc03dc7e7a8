"""What every command shares: errors of users end in one line, never in a traceback. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from star_dist.errors import RunEnded, Unavailable, UserError
from star_dist.files import FULL_DISK

# Exit codes of all commands beside 0. launcher/retry.py reads them: once more after PREEMPTED, never after INTERRUPTED
# and a USER_ERROR that the training wrote down, and a limited number of times after everything else.
USER_ERROR_EXIT = UserError.exit_code
UNAVAILABLE_EXIT = Unavailable.exit_code  # a store or the network: no mistake of a user
HANG_EXIT = 70  # EX_SOFTWARE of sysexits.h: the watchdog ended a training that stood still
PREEMPTED_EXIT = 75  # EX_TEMPFAIL of sysexits.h: saved on SIGUSR1 or SIGTERM, and wants to go on
INTERRUPTED_EXIT = 130  # Ctrl-C, as shells have it; a training has saved before
BROKEN_PIPE_EXIT = 141  # SIGPIPE, as shells have it
OTHER_RANKS_WAIT_S = 10
LOST_RANK = re.compile(r"gloo.*?(Connection (?:closed|reset) by peer|Broken pipe)", re.DOTALL)  # as gloo says it


def check_is_no_folder(out: Path) -> None:
    """Whether a command's result can go to the file that --out names, before it is worked for.

    Raises:
        UserError: it is a folder.
    """
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file, in it or elsewhere")


def run_command(main: Callable[[], None]) -> NoReturn:
    """Runs a command's `main` and exits: 0, 2 or 69 with `error: …` on stderr for a UserError, 2 for a full disk, 1 for
    a file that cannot be read or written and for a rank that has lost another, 141 in silence where nobody reads stdout
    any more, or as asked.
    """
    try:
        with _full_disk_is_a_mistake():
            main()
            sys.stdout.flush()
    except UserError as error:
        local_rank = os.environ.get("LOCAL_RANK", "0")
        if local_rank != "0":
            # The first rank of the host has most likely found the same; the launcher then ends this one as it waits.
            time.sleep(OTHER_RANKS_WAIT_S)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except RunEnded as ended:
        if os.environ.get("RANK", "0") == "0":
            print(ended, file=sys.stderr, flush=True)
        sys.exit(ended.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():
            _forget_stdout()
            sys.exit(BROKEN_PIPE_EXIT)
        if error.filename is None or "RANK" in os.environ:  # of a training people want to know where it was
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(1)
    except RuntimeError as error:
        lost = LOST_RANK.search(str(error))
        if lost is None or "RANK" not in os.environ:
            raise
        time.sleep(OTHER_RANKS_WAIT_S)  # a launcher that sees the other's end ends this one, and one message is left
        print(
            f"error: rank {os.environ['RANK']} has lost another rank, whose own message says why it ended ({lost[1]})",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED_EXIT)
    sys.exit(0)


@contextlib.contextmanager
def _full_disk_is_a_mistake() -> Iterator[None]:
    """Turns the error of a disk that is full, or of a quota that is used up, into a message.

    Raises:
        UserError: in place of that error.
    """
    try:
        yield
    except Exception as error:
        found: OSError | None = error if isinstance(error, OSError) else _hidden_os_error(error)
        if found is None or found.errno not in FULL_DISK:
            raise
        name = found.filename2 or found.filename  # a copy has both, the second is where it goes
        try:
            sys.stdout.flush()
        except OSError:
            name = name or "standard output"
            _forget_stdout()
        place = "" if name is None else f" to {name}"
        raise UserError(
            f"cannot write{place}: {os.strerror(found.errno)}; make room and run the same command again"
        ) from None


def _hidden_os_error(error: Exception) -> OSError | None:
    """What the libraries that write weights hide in errors of their own."""
    if "safetensors" not in sys.modules:
        return None
    from star_dist.weights import system_error

    return system_error(error)


def _forget_stdout() -> None:
    """For what Python flushes at its end, which would fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nobody_reads_stdout() -> bool:
    """Whether the reader of a pipe has ended, as `| head` does."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in stdout.poll(0))


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser that shows the module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config FILE` and `section.key=value` overrides, read by `star_dist.config.load_config`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values of the config")
