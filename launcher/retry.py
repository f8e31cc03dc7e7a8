"""Whether a training that ended with an exit code is worth another attempt: exit 0 if it is, 1 if not.

`python launcher/retry.py --config configs/d30.json --exit-code 137 --since 1764000000`, for job scripts. It writes the
attempt into the run's facts, and gives up after --max-failures attempts in a row without a new checkpoint.
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


def main() -> None:
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--exit-code", type=int, required=True, help="how the attempt ended")
    parser.add_argument("--since", type=float, required=True, metavar="SECONDS", help="when it began, since the epoch")
    parser.add_argument(
        "--max-failures", type=int, default=3, metavar="N", help="attempts without progress (default 3)"
    )
    arguments = parser.parse_args()

    from pathlib import Path

    from star_dist.config import RunConfig, load_config
    from star_dist.train.facts import append_event, exit_code_since, failures_without_progress

    run_dir = Path(load_config(RunConfig, arguments.config, arguments.overrides).run_dir)
    own_code = exit_code_since(run_dir, arguments.since)
    code = arguments.exit_code if own_code is None else own_code
    if code == PREEMPTED_EXIT:
        print("saved and ended before its time: once more")
        return
    if code in (0, USER_ERROR_EXIT, INTERRUPTED_EXIT):
        sys.exit(f"exit code {code}: nothing that another attempt would change")
    run_dir.mkdir(parents=True, exist_ok=True)
    append_event(run_dir, "failed", exit_code=code)
    failures = failures_without_progress(run_dir)
    if failures >= arguments.max_failures:
        sys.exit(f"exit code {code}: failed {failures} times without a new checkpoint, giving up")
    print(f"exit code {code}: failure {failures} of {arguments.max_failures} without a new checkpoint, once more")


if __name__ == "__main__":
    run_command(main)
