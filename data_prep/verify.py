"""Read a merged data set back: `python -m data_prep.verify OUTPUT`, a folder or s3://bucket/prefix.

Checks every shard's size, hash and columns, every sample's tokens, captions and features, all counts, and that no key
comes twice. Prints a report, or JSON with --json. Exits with 1 where anything is damaged.
"""

from __future__ import annotations

import os
import sys

from star_dist.cli import command_parser, run_command

DAMAGED_EXIT = 1


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("output", metavar="OUTPUT", help="`output` of the tokenization job")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read (default: one per CPU)")
    parser.add_argument("--endpoint", help="of an S3 store (default: S3_ENDPOINT_URL, or Amazon's)")
    parser.add_argument("--region", help="of an S3 store (default: the environment's)")
    arguments = parser.parse_args()

    import json

    from data_prep.verification import verify
    from star_dist.config import StorageSection
    from star_dist.errors import UserError

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers must be at least 1, got {arguments.workers}")
    storage = StorageSection(endpoint=arguments.endpoint, region=arguments.region)
    reports = verify(arguments.output, storage, arguments.workers or len(os.sched_getaffinity(0)))
    if arguments.json:
        print(json.dumps([report.as_json() for report in reports], indent=2))
    else:
        print("\n".join(map(str, reports)))
    if any(report.problems for report in reports):
        sys.exit(DAMAGED_EXIT)


if __name__ == "__main__":
    run_command(main)
