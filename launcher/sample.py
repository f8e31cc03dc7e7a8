"""Draw pictures from text: `python launcher/sample.py exports/d30 "a red heart" --seed 1 --out heart.png`.

Several prompts make several files (out-0.png, out-1.png, …); --prompts-file takes one prompt per line.
"""

from star_dist.cli import command_parser, run_command
from star_dist.inference.arguments import (
    add_model_arguments,
    add_sampling_arguments,
    add_seed_argument,
    check_amounts,
    check_seeds,
    load_pipeline,
    numbered_paths,
    picture_path,
    sampling_options,
)


def main() -> None:
    parser = command_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts-file", metavar="FILE", help="one prompt per line, in addition")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture file, .png or .jpg")
    parser.add_argument("--count", type=int, default=1, help="pictures per prompt (default 1)")
    add_seed_argument(parser)
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn together (default 8)")
    add_sampling_arguments(parser)
    arguments = parser.parse_intermixed_args()

    from pathlib import Path

    from star_dist.errors import UserError
    from star_dist.files import read_text_lines

    options = sampling_options(arguments)
    prompts = list(arguments.prompts)
    if arguments.prompts_file:
        prompts += read_text_lines(Path(arguments.prompts_file))
    if not prompts:
        raise UserError("no prompt given; put it after the folder, in quotes, or use --prompts-file")
    check_amounts(arguments.count, arguments.batch)
    check_seeds(arguments.seed, len(prompts) * arguments.count)
    out = picture_path(arguments.out)

    from tqdm import tqdm

    pipeline = load_pipeline(arguments)
    options.by_scale(len(pipeline.schedule))  # one value too many or too few is found before anything is drawn
    pipeline.text_encoder.check_fit(prompts)
    jobs = [prompt for prompt in prompts for _ in range(arguments.count)]
    paths = numbered_paths(out, len(jobs))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(jobs), unit="picture") as bar:
        for first in range(0, len(jobs), arguments.batch):
            pictures = pipeline(jobs[first : first + arguments.batch], arguments.seed + first, options)
            for path, picture in zip(paths[first:], pictures):
                picture.save(path)
            bar.update(len(pictures))
    print("\n".join(str(path) for path in paths))


if __name__ == "__main__":
    run_command(main)
