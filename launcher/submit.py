"""Submit a training to Slurm: `python launcher/submit.py configs/d30.json --nodes 8 [section.key=value …]`.

Makes the run folder with the resolved config, the code's commit and the script that submits the job, and runs it. The
job comes back after pre-emption, time limits and failures until it is done; the same script submits it again by hand.
"""

from star_dist.cli import command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("config", metavar="FILE", help="JSON configuration of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values of the config")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    parser.add_argument("--time", metavar="LIMIT", help="time limit, as sbatch takes it (default: site.sh's)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="one more for sbatch: --sbatch=--exclude=n7"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, write nothing")
    arguments = parser.parse_intermixed_args()

    from star_dist.config import RunConfig, load_config
    from star_dist.errors import UserError
    from star_dist.submission import prepare_submission

    if arguments.nodes < 1:
        raise UserError(f"--nodes must be positive, got {arguments.nodes}")
    options = [f"--nodes={arguments.nodes}"]
    options += [f"--time={arguments.time}"] if arguments.time else []
    submission = prepare_submission(
        load_config(RunConfig, arguments.config, arguments.overrides), [*options, *arguments.sbatch]
    )
    if arguments.dry_run:
        print(submission.script, end="")
        return
    print(submission.submit())


if __name__ == "__main__":
    run_command(main)
