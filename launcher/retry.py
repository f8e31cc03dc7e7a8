"""Whether a training that ended with an exit code is worth another attempt: exit 0 if it is, 1 if not.

`python launcher/retry.py --config configs/d30.json --exit-code 137 --since 1764000000`, for job scripts. It writes the
attempt into the run's facts, and gives up after --max-failures attempts in a row without a new checkpoint. With --check
alone it says whether the nodes are worth a check: exit 0 unless the last attempt was asked to end and did.
"""

import sys

from star_dist.cli import (
    INTERRUPTED_EXIT,
    PREEMPTED_EXIT,
    USER_ERROR_EXIT,
    add_config_arguments,
    command_parser,
    run_command,
)

FINAL_CODES = (0, USER_ERROR_EXIT, INTERRUPTED_EXIT)


def main() -> None:
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--check", action="store_true", help="whether launcher/preflight.py should run before a start")
    parser.add_argument("--exit-code", type=int, help="how the attempt ended")
    parser.add_argument("--since", type=float, default=0, metavar="SECONDS", help="when it began, since the epoch")
    parser.add_argument("--signalled", action="store_true", help="the job was asked to end before the attempt did")
    parser.add_argument(
        "--max-failures", type=int, default=3, metavar="N", help="attempts without progress (default 3)"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.exit_code is None and not arguments.check:
        parser.error("one of --exit-code and --check is required")

    from pathlib import Path

    from star_dist.config import RunConfig, load_config
    from star_dist.train.facts import (
        append_event,
        ended_in_order,
        exit_code_since,
        failures_without_progress,
        slurm_job,
    )

    run_dir = Path(load_config(RunConfig, arguments.config, arguments.overrides).run_dir)
    if arguments.check:
        sys.exit(1 if ended_in_order(run_dir) else 0)
    own_code = exit_code_since(run_dir, arguments.since)
    code = arguments.exit_code if own_code is None else own_code
    # Nobody's mistake unless the training has said so: python, too, exits with 2 where it cannot open its script.
    final = code in FINAL_CODES and (code != USER_ERROR_EXIT or own_code is not None)
    if arguments.signalled and own_code is None and not final:
        print(f"exit code {code}: the signal came before the training could save: once more")
        return
    if code == PREEMPTED_EXIT:
        print("saved and ended before its time: once more")
        return
    if final:
        sys.exit(f"exit code {code}: nothing that another attempt would change")
    run_dir.mkdir(parents=True, exist_ok=True)
    before = failures_without_progress(run_dir)
    append_event(run_dir, "failed", exit_code=code, job=slurm_job())
    failures = failures_without_progress(run_dir)
    if failures == before:
        sys.exit(
            f"exit code {code}: the facts of {run_dir} cannot be written, so attempts cannot be counted: giving up"
        )
    if failures >= arguments.max_failures:
        sys.exit(f"exit code {code}: failed {failures} times without a new checkpoint, giving up")
    print(f"exit code {code}: failure {failures} of {arguments.max_failures} without a new checkpoint, once more")


if __name__ == "__main__":
    run_command(main)
