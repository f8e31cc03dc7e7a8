"""What a run needs before it starts: `python launcher/plan.py --config configs/d30_512.json --gpus 64 --gpu h200`.

Memory per GPU by part, the largest micro-batch that fits, step time at a stated MFU, communication, days and storage.
Reckoned from formulas (docs/performance.md says how well they met measurements); needs no GPU, no data and no torch.
"""

import json
import math

from star_dist.cli import add_config_arguments, command_parser, run_command


def main() -> None:
    from star_dist.train.planning import GPUS, plan

    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu", choices=list(GPUS), default="h200", help="their kind (default h200)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation to assume (default 0.4)")
    parser.add_argument("--pictures", type=float, metavar="N", help="to train on (default: all of train.steps)")
    parser.add_argument("--dataset", type=float, default=10e6, metavar="N", help="pictures to store (default 1e7)")
    parser.add_argument("--json", action="store_true", help="print the numbers for a script")
    arguments = parser.parse_intermixed_args()

    from star_dist.config import RunConfig, load_config
    from star_dist.errors import UserError

    for name in ("gpus", "gpus_per_node", "dataset", "pictures"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu must lie above 0 and up to 1, got {arguments.mfu}")
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    pictures = arguments.pictures or config.train.steps * config.train.global_batch
    numbers = plan(config, arguments.gpus, arguments.gpu, arguments.gpus_per_node, arguments.mfu, pictures)
    print(json.dumps(numbers, indent=2) if arguments.json else as_text(numbers, arguments.gpus, arguments.dataset))


def as_text(numbers: dict, gpus: int, dataset: float) -> str:
    """The plan for people."""
    gib = 2**30
    memory = [f"  {name:<24}{size / gib:8.2f} GiB" for name, size in numbers["memory_bytes"].items()]
    fits = numbers["memory_total_bytes"] <= numbers["usable_memory_bytes"]
    usable = numbers["usable_memory_bytes"] / gib
    stage = numbers["recommended_zero_stage"]
    largest = "none fits" if numbers["largest_micro_batch"] is None else str(numbers["largest_micro_batch"])
    if stage not in (None, numbers["zero_stage"]):  # the two are changed together
        largest += f" at ZeRO stage {numbers['zero_stage']}, {numbers['largest_micro_batch_there']} at {stage}"
    per_picture = numbers["storage_bytes_per_picture"]
    bound = "communication" if numbers["communication_s"] > numbers["compute_s"] else "compute"
    lines = [
        f"{numbers['parameters']:,} parameters, {numbers['tokens_per_picture']:,} tokens a picture "
        f"({numbers['visible_pairs_share']:.3f} of all pairs visible); "
        f"{numbers['trained_tokens_per_picture']:,} of them are trained",
        f"memory per GPU at micro-batch {numbers['micro_batch']} ({numbers['accumulation_steps']} a step):",
        *memory,
        f"  {'together':<24}{numbers['memory_total_bytes'] / gib:8.2f} GiB of {usable:.0f} usable"
        + ("" if fits else "  DOES NOT FIT"),
        "  the frozen tokenizer and text encoder come on top (public ones: 0.4 and 0.7 GiB)",
        f"largest micro-batch     {largest}",
        f"ZeRO stage              {numbers['zero_stage']}; recommended: "
        + ("none fits" if stage is None else f"{stage}, the least communication that fits"),
        f"train.compile           {numbers['compile']}; recommended: {numbers['recommended_compile']}",
        f"step                    {numbers['step_s']:.3f} s, bound by {bound} (the two overlap)",
        f"  compute               {numbers['compute_s']:.3f} s: {numbers['flops_per_step']:.3e} FLOPs at MFU "
        f"{numbers['assumed_mfu']}",
        f"  communication         {numbers['communication_s']:.3f} s: {numbers['communication_bytes'] / 1e9:.2f} GB "
        f"sent per GPU at {numbers['link_gb_per_s']} GB/s",
        f"throughput              {numbers['images_per_s']:.0f} pictures/s",
        f"{numbers['pictures']:.3g} pictures         {numbers['days']:.2f} days on {gpus} GPUs, "
        f"{numbers['gpu_hours']:.0f} GPU-hours",
        f"storage of {dataset:.3g}       {dataset * per_picture['tokens and caption'] / 1e12:.3f} TB; with text "
        f"features up to {dataset * sum(per_picture.values()) / 1e12:.1f} TB",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
