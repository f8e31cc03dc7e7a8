"""Re-caption pictures: `python -m data_prep.caption --config configs/prep/recaption.json`.

Any image-to-text or vision-language model of Hugging Face that loads with AutoModelForImageTextToText writes one more
caption of every picture, beside the originals: a tokenization job finds them by `source.recaptions`, and training
draws between them by `data.caption_weights`. The same command again goes on where it was killed.

With --partition i/N it does one of N shares, for as many jobs of a cluster.
"""

from __future__ import annotations

from star_dist.cli import add_config_arguments, command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--partition", default="0/1", metavar="i/N", help="do share i of N, counted from 0")
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode (default: one per CPU)")
    arguments = parser.parse_intermixed_args()

    from data_prep.partition import Partition
    from star_dist.config import CaptionConfig, load_config
    from star_dist.errors import UserError

    config = load_config(CaptionConfig, arguments.config, arguments.overrides)
    partition = Partition.parse(arguments.partition)
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers must be at least 1, got {arguments.workers}")

    from data_prep.captioning import caption

    caption(config, partition, arguments.device, arguments.workers)


if __name__ == "__main__":
    run_command(main)
