"""Export a training run for inference: `python launcher/export.py runs/d30 --out exports/d30`.

Reads the newest complete checkpoint (or that of --step), writes one folder with the weights as safetensors, config,
tokenizer and text encoder, and reloads it to verify that it is what the checkpoint holds. Needs no GPU.
"""

from star_dist.cli import command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder of the training")
    parser.add_argument("--out", required=True, metavar="DIR", help="inference folder to write (replaced if it exists)")
    parser.add_argument("--step", type=int, help="optimizer step of the checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="stored precision (default bf16)")
    parser.add_argument("--licence", metavar="ID", help="of the weights, as the hub names it, for the model card")
    arguments = parser.parse_args()

    from pathlib import Path

    from star_dist.train.export_checkpoint import export_checkpoint

    step = export_checkpoint(
        Path(arguments.run), Path(arguments.out), arguments.step, arguments.dtype, arguments.licence
    )
    print(f"exported step {step} of {arguments.run} to {arguments.out} ({arguments.dtype}), reloaded and verified")


if __name__ == "__main__":
    run_command(main)
