"""One node's ranks: `python launcher/node.py --nnodes=8 --nproc-per-node=8 --master-addr=… --master-port=… SCRIPT …`.

torchrun with two additions that jobs need: SIGUSR1 goes on to the ranks, which save and end, and the exit code is that
of the first rank that failed (torchrun's own is always 1). Under srun the node's rank comes from SLURM_NODEID.
"""

import os
import signal
import sys


def main() -> int:
    import psutil
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    def pass_on(number: int, _: object) -> None:
        for child in psutil.Process().children():
            if "LOCAL_RANK" in child.environ():
                child.send_signal(number)

    signal.signal(signal.SIGUSR1, pass_on)
    node_rank = os.environ.get("SLURM_NODEID", "0")
    try:
        run(parse_args([f"--node-rank={node_rank}", *sys.argv[1:]]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval  # whether the ranks have saved stands in the run's facts
    return 0


if __name__ == "__main__":
    sys.exit(main())
