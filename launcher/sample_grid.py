"""Draw a labelled grid for captions of a data set: what the data shows beside what the model draws.

`python launcher/sample_grid.py exports/demo --data runs/demo/data --captions configs/demo_captions.txt --out grid.png`.
Captions of the training split stand under "seen in training", those of the validation split alone under "held out", and
all others under "new". The first picture of a cell is the data set's own, through the tokenizer.
"""

from star_dist.cli import command_parser, run_command
from star_dist.inference.arguments import (
    JPEG_LONGEST_SIDE,
    add_model_arguments,
    add_sampling_arguments,
    add_seed_argument,
    check_seeds,
    load_pipeline,
    picture_path,
    sampling_options,
)


def main() -> None:
    parser = command_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, metavar="DIR", help="data set with train and val splits")
    parser.add_argument("--captions", required=True, metavar="FILE", help="one caption per line")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture file, .png or .jpg")
    parser.add_argument("--count", type=int, default=2, help="pictures drawn per caption (default 2)")
    parser.add_argument("--columns", type=int, default=4, help="captions per row (default 4)")
    add_seed_argument(parser)
    add_sampling_arguments(parser)
    arguments = parser.parse_args()

    from pathlib import Path

    from star_dist.errors import UserError
    from star_dist.files import read_text_lines

    options = sampling_options(arguments)
    out = picture_path(arguments.out)
    captions = read_text_lines(Path(arguments.captions))
    if arguments.count < 1 or arguments.columns < 1:
        raise UserError(f"--count and --columns must be positive, got {arguments.count} and {arguments.columns}")
    if not captions:
        raise UserError(f"{arguments.captions} holds no caption")
    check_seeds(arguments.seed, len(captions) * arguments.count)

    from star_dist.inference.seen_grid import draw_seen_grid

    longest_side = None if out.suffix.lower() == ".png" else JPEG_LONGEST_SIDE
    pipeline = load_pipeline(arguments)
    options.by_scale(len(pipeline.schedule))  # one value too many or too few is found before anything is drawn
    out.parent.mkdir(parents=True, exist_ok=True)  # one that cannot be made is found before anything is drawn, too
    grid = draw_seen_grid(
        pipeline,
        Path(arguments.data),
        captions,
        options,
        arguments.count,
        arguments.columns,
        arguments.seed,
        longest_side,
    )
    grid.save(out)
    print(out)


if __name__ == "__main__":
    run_command(main)
