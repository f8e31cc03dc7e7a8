"""Edit pictures with a trained model.

`python launcher/edit.py inpaint exports/d30 photo.png "a red hat" --mask hat.png --out new.png` draws what is white in
the mask anew and keeps what is black. `outpaint … --box 0.25,0.25,0.75,0.75` places the picture there on the canvas
(left, top, right, bottom as fractions) and draws its surroundings. `vary … --keep-scales 4` keeps the picture's first
scales, so layout and colours, and draws the details anew. Several pictures (--count) make out-0.png, out-1.png, …
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

WAYS = {
    "inpaint": "draw the white part of a mask anew, and keep the rest of a picture",
    "outpaint": "draw what lies around a picture that becomes a part of a larger one",
    "vary": "draw anew what the finer scales of a picture add, and keep its coarse ones",
}


def main() -> None:
    parser = command_parser(__doc__)
    ways = parser.add_subparsers(dest="way", required=True, metavar="inpaint | outpaint | vary")
    for way, does in WAYS.items():
        one = ways.add_parser(way, help=does, description=does)
        add_model_arguments(one)
        one.add_argument("picture", metavar="PICTURE", help="square picture, resized to what the model draws")
        one.add_argument("prompt", metavar="PROMPT")
        one.add_argument("--out", required=True, metavar="FILE", help="picture file, .png or .jpg")
        one.add_argument("--count", type=int, default=1, help="pictures to draw (default 1)")
        add_seed_argument(one)
        one.add_argument("--batch", type=int, default=8, help="pictures drawn together (default 8)")
        if way == "inpaint":
            one.add_argument("--mask", required=True, metavar="FILE", help="of the picture's size; white is drawn anew")
        elif way == "outpaint":
            one.add_argument("--box", required=True, metavar="L,T,R,B", help="its place, fractions of the canvas")
        else:
            one.add_argument("--keep-scales", type=int, required=True, metavar="N", help="scales to keep of it")
        add_sampling_arguments(one)
    arguments = parser.parse_args()

    from pathlib import Path

    from star_dist.errors import UserError

    options = sampling_options(arguments)
    check_amounts(arguments.count, arguments.batch)
    check_seeds(arguments.seed, arguments.count)
    out = picture_path(arguments.out)
    box = ()
    if arguments.way == "outpaint":
        try:
            box = tuple(float(part) for part in arguments.box.split(","))
        except ValueError:
            box = ()
        if len(box) != 4:
            raise UserError(f"--box takes four numbers, left,top,right,bottom; got {arguments.box!r}")

    from star_dist.data.pictures import read_picture

    picture = read_picture(Path(arguments.picture))
    mask = read_picture(Path(arguments.mask)) if arguments.way == "inpaint" else None

    from star_dist.inference import editing

    pipeline = load_pipeline(arguments)
    pipeline.text_encoder.check_fit([arguments.prompt])
    how = {"inpaint": mask, "outpaint": box, "vary": getattr(arguments, "keep_scales", None)}[arguments.way]
    paths = numbered_paths(out, arguments.count)
    out.parent.mkdir(parents=True, exist_ok=True)
    for first in range(0, arguments.count, arguments.batch):
        some = paths[first : first + arguments.batch]
        prompts = [arguments.prompt] * len(some)
        pictures = getattr(editing, arguments.way)(pipeline, prompts, picture, how, arguments.seed + first, options)
        for path, drawn in zip(some, pictures):
            drawn.save(path)
            print(path)


if __name__ == "__main__":
    run_command(main)
