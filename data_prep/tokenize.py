"""Tokenize captioned pictures to MDS shards: `python -m data_prep.tokenize --config configs/prep/demo.json`.

Writes the data set that training streams: one MDS folder per split and `dataset.json`, which records the tokenizer's
hash. Pictures that cannot be used are skipped, counted by reason and listed in `rejects.jsonl`. A finished output is
reused; an unfinished one is started anew.
"""

from __future__ import annotations

from star_dist.cli import add_config_arguments, command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    arguments = parser.parse_args()

    from star_dist.config import PrepConfig, load_config

    config = load_config(PrepConfig, arguments.config, arguments.overrides)

    from data_prep.tokenization import tokenize

    tokenize(config, arguments.device)


if __name__ == "__main__":
    run_command(main)
