"""Tokenize captioned pictures to MDS shards: `python -m data_prep.tokenize --config configs/prep/demo.json`.

Writes the data set that training streams: MDS shards per split and `dataset.json`, which records the tokenizer's hash.
Pictures that cannot be used are skipped, counted by reason and listed in `rejects.jsonl`. The same command again skips
what is done and goes on where it was killed.

With --partition i/N it does one of N shares of the work, for as many jobs of a cluster; when all are done,
`python -m data_prep.merge OUTPUT` makes one data set of them. Without it, it does all and merges.
"""

from __future__ import annotations

from star_dist.cli import add_config_arguments, command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--partition", metavar="i/N", help="do share i of N, counted from 0 (default: all, and merge)")
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode (default: one per CPU)")
    arguments = parser.parse_intermixed_args()

    from data_prep.partition import Partition
    from star_dist.config import PrepConfig, load_config
    from star_dist.errors import UserError

    config = load_config(PrepConfig, arguments.config, arguments.overrides)
    partition = Partition.parse(arguments.partition) if arguments.partition is not None else None
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers must be at least 1, got {arguments.workers}")

    from data_prep.tokenization import tokenize, tokenize_partition

    if partition is None:
        tokenize(config, arguments.device, arguments.workers)
    else:
        tokenize_partition(config, partition, arguments.device, arguments.workers)


if __name__ == "__main__":
    run_command(main)
