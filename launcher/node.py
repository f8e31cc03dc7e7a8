"""One node's ranks: `python launcher/node.py --nnodes=8 --nproc-per-node=8 --master-addr=… --master-port=… SCRIPT …`.

torchrun with three additions that jobs need: SIGUSR1 goes on to the ranks, which save and end; the exit code is that of
the first rank that failed (torchrun's own is always 1); and nodes that do not come have a name. Under srun the node's
rank comes from SLURM_NODEID.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from star_dist.cli import UNAVAILABLE_EXIT
from star_dist.errors import first_line

RANKS_POLL_S = 0.2


def main() -> int:
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    asked = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: asked.set())
    threading.Thread(target=pass_on, args=(asked,), daemon=True).start()
    node_rank = os.environ.get("SLURM_NODEID", "0")
    try:
        run(parse_args([f"--node-rank={node_rank}", *sys.argv[1:]]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval  # whether the ranks have saved stands in the run's facts
    except (DistError, TimeoutError) as error:
        node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
        print(
            f"error: node {node} did not meet the others of {os.environ.get('SLURM_JOB_NODELIST', 'the job')}: "
            f"{first_line(error)}; a node that prints no such line did not come at all",
            file=sys.stderr,
            flush=True,
        )
        return UNAVAILABLE_EXIT
    return 0


def pass_on(asked: threading.Event) -> None:
    """Sends SIGUSR1 on whenever this process was sent it, as soon as there are ranks that listen.

    One that does not listen yet would die of it. One is enough, because ranks agree on what they were asked.
    """
    while asked.wait():
        for rank in listening_ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGUSR1)
                asked.clear()
        time.sleep(RANKS_POLL_S)


def listening_ranks() -> list[int]:
    """Process ids of this process's ranks that handle SIGUSR1."""
    import psutil

    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error, OSError):  # it may end at any moment
                if "LOCAL_RANK" in child.environ() and _handles(child.pid, signal.SIGUSR1):
                    found.append(child.pid)
    return found


def _handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, as Linux tells it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


if __name__ == "__main__":
    sys.exit(main())
