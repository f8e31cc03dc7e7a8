"""Where a run stands: `python launcher/status.py runs/d30`. Reads the run folder only, on any machine that sees it."""

from star_dist.cli import command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()

    import json
    from pathlib import Path

    from star_dist.train.status import describe_status, run_status

    status = run_status(Path(arguments.run))
    print(json.dumps(status, indent=2) if arguments.json else describe_status(status))


if __name__ == "__main__":
    run_command(main)
