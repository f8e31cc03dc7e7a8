"""Merge the partitions of a tokenization job: `python -m data_prep.merge OUTPUT`, a folder or s3://bucket/prefix.

Refuses a set with a missing, foreign or damaged partition and names it. Shards stay where they are; what is written
is the index of each split, rejects.jsonl and dataset.json, which makes it a data set.
"""

from __future__ import annotations

from star_dist.cli import command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("output", metavar="OUTPUT", help="`output` of the tokenization job")
    parser.add_argument("--endpoint", help="of an S3 store (default: S3_ENDPOINT_URL, or Amazon's)")
    parser.add_argument("--region", help="of an S3 store (default: the environment's)")
    arguments = parser.parse_args()

    from data_prep.merging import merge
    from star_dist.config import StorageSection

    merge(arguments.output, StorageSection(endpoint=arguments.endpoint, region=arguments.region))


if __name__ == "__main__":
    run_command(main)
