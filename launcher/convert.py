"""Convert public checkpoints to an inference folder, and back; exact both ways.

`python launcher/convert.py from-public --transformer star_d16.pth --tokenizer vae_ch160v4096z32.pth --resolution 256
--out DIR` reads STAR's transformer and VAR's VQ-VAE (.pth files with weights_only, or .safetensors).
`python launcher/convert.py to-public exports/d16 --out public/d16` writes star.pth, vae.pth and conversion.json, which
says what the files do not: scales, RoPE, norm groups, text encoder. from-public reads it where it lies beside the
transformer's file; nothing of it has to be given again then, and what is given must agree with it.
"""

from star_dist.cli import command_parser, run_command
from star_dist.errors import UserError
from star_dist.scales import PUBLIC_SCALES, ScaleSchedule


def sides(option: str, given: str | None) -> tuple[int, ...] | None:
    """What an option that takes scales was given."""
    if given is None:
        return None
    try:
        return ScaleSchedule(tuple(int(part) for part in given.split(","))).sides
    except ValueError as error:
        raise UserError(f"{option} takes growing whole numbers from 1 on, got {given!r}: {error}") from None


def main() -> None:
    parser = command_parser(__doc__)
    ways = parser.add_subparsers(dest="way", required=True, metavar="from-public | to-public")
    ours = ways.add_parser("from-public", help="public checkpoint files to an inference folder")
    ours.add_argument("--transformer", required=True, metavar="FILE", help="STAR transformer, .pth or .safetensors")
    ours.add_argument("--tokenizer", required=True, metavar="FILE", help="VAR's VQ-VAE, .pth or .safetensors")
    ours.add_argument("--out", required=True, metavar="DIR", help="inference folder to write (replaced if it is one)")
    size = ours.add_mutually_exclusive_group()
    size.add_argument("--resolution", type=int, choices=PUBLIC_SCALES, help="of a public model, in pixels: its scales")
    size.add_argument("--scales", metavar="1,2,…", help="sides of the token maps of any other model")
    ours.add_argument("--tokenizer-scales", metavar="1,2,…", help="of the VQ-VAE's training, where they are others")
    ours.add_argument("--rope-convention", choices=("public", "paper"), help="of the weights (default public)")
    ours.add_argument("--rope-theta", type=float, help="of the weights (default 10000)")
    ours.add_argument("--rope-extent", type=float, help="of the weights (default 64)")
    ours.add_argument("--norm-groups", type=int, help="of the VQ-VAE's GroupNorm (default 32)")
    ours.add_argument("--text-encoder", metavar="ID", help="id or folder (default: Stable Diffusion 2.1's, as STAR)")
    ours.add_argument("--text-encoder-subfolder", metavar="NAME", help="the model in it (default text_encoder)")
    ours.add_argument("--text-tokenizer-subfolder", metavar="NAME", help="its tokenizer (default tokenizer)")
    ours.add_argument("--text-max-tokens", type=int, help="tokens of a prompt that are read (default 77)")
    ours.add_argument("--text-pooling", choices=("auto", "pooler", "mean"), help="of a prompt's tokens (default auto)")
    ours.add_argument("--licence", metavar="ID", help="of the weights, as the hub names it, for the model card")
    public = ways.add_parser("to-public", help="an inference folder to public checkpoint files")
    public.add_argument("model", metavar="DIR", help="inference folder or Hugging Face id")
    public.add_argument("--out", required=True, metavar="DIR", help="new folder for the files")
    public.add_argument("--format", choices=("pth", "safetensors"), default="pth", help="of the files (default pth)")
    arguments = parser.parse_args()

    import logging
    from pathlib import Path

    from star_dist.config import parse_config

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if arguments.way == "from-public":
        text = {
            "encoder": arguments.text_encoder,
            "encoder_subfolder": arguments.text_encoder_subfolder,
            "tokenizer_subfolder": arguments.text_tokenizer_subfolder,
            "max_tokens": arguments.text_max_tokens,
            "pooling": arguments.text_pooling,
        }
        options = {
            "scales": PUBLIC_SCALES.get(arguments.resolution) or sides("--scales", arguments.scales),
            "tokenizer_scales": sides("--tokenizer-scales", arguments.tokenizer_scales),
            "rope_convention": arguments.rope_convention,
            "rope_theta": arguments.rope_theta,
            "rope_extent": arguments.rope_extent,
            "norm_groups": arguments.norm_groups,
            "text": {key: value for key, value in text.items() if value is not None},
        }
        from star_dist.conversion import from_public
        from star_dist.public_layout import PublicCheckpointOptions

        typed = {key: value for key, value in options.items() if value is not None}
        given = parse_config(PublicCheckpointOptions, typed, "options of from-public")
        files = Path(arguments.transformer), Path(arguments.tokenizer)
        config = from_public(*files, Path(arguments.out), given, arguments.licence)
        model = config.model
        print(
            f"{arguments.out}: depth {model.depth}, width {model.width}, {config.resolution} pixels, scales "
            f"{list(model.scales)}, RoPE convention {model.rope_convention}, theta {model.rope_theta:g}, extent "
            f"{model.rope_extent:g}, {config.dtype}, text encoder {config.text.encoder}"
        )
        return
    from star_dist.conversion import to_public

    record = to_public(arguments.model, Path(arguments.out), arguments.format)
    print(f"{arguments.out}: star.{arguments.format}, vae.{arguments.format}, conversion.json")
    for name, value in record["public_code_must_change"].items():
        logging.warning("warning: the model has %s %s, for which STAR's public code must be changed", name, value)


if __name__ == "__main__":
    run_command(main)
