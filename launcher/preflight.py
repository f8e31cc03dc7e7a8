"""Check a job's nodes before training: `srun … launcher/node.py … launcher/preflight.py --config configs/d30.json`.

Starts like launcher/train.py, under any launcher, one process per GPU. Prints a table with one line per node and exits
with 1, naming the bad nodes, if GPUs, drivers or library versions differ, a GPU is slow, a node has no room, or the
run's folder, data, tokenizer or S3 cannot be used from it; with 69 if all that is wrong is out of reach, such as a
store. train.sbatch runs it before the first start.
"""

import os
import sys

from star_dist.cli import add_config_arguments, command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the findings as JSON, too")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher, not by people")
    arguments = parser.parse_intermixed_args()

    import json
    from pathlib import Path

    from star_dist.config import RunConfig, load_config
    from star_dist.process import prepare_process_environment

    config = load_config(RunConfig, arguments.config, arguments.overrides)
    process = prepare_process_environment(config.train.omp_threads)

    from star_dist.files import write_text_atomically
    from star_dist.train.preflight import preflight

    result = preflight(config, process)
    if process.rank == 0:
        print(result.table(), flush=True)
        if arguments.json:
            Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(Path(arguments.json), json.dumps(result.as_json(), indent=2) + "\n")
        if result.problems:
            print(f"error: bad nodes: {', '.join(result.problems)}", file=sys.stderr, flush=True)
    # At once: a rank that had passed was once aborted while the interpreter ended ("terminate called without an active
    # exception", most likely a thread of gloo), and a good node was called bad.
    sys.stdout.flush()
    os._exit(result.exit_code)


if __name__ == "__main__":
    run_command(main)
