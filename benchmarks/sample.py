"""How fast pictures are drawn: by resolution and batch, share of every scale, against a naive sampler and the floor.

`python benchmarks/sample.py --config configs/d30.json --batches 1,8,32 --json sample.json`; weights are random, which
takes the same time as trained ones. On a GPU scales are replayed as CUDA graphs and pictures decoded in bf16, as
`StarPipeline` does. --quick draws with two blocks of the model, to see that it runs. The naive sampler computes all
tokens so far again at every scale, in the same run with the same guidance. The floor is the larger of two times: all
weights (and the cache) read once per scale at the measured copy bandwidth, and the FLOPs of both halves at the measured
matrix-product rate. Every round times the matrix product, our sampler and the naive one after another; times and ratios
are medians over rounds, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import (
    at_least,
    chosen_device,
    device_name,
    fill_with_noise,
    median_seconds,
    print_table,
    wait_for,
    write_json,
)
from tqdm import tqdm

from star_dist.cli import command_parser, run_command
from star_dist.config import RunConfig, load_config
from star_dist.errors import UserError
from star_dist.inference.acceleration import RecordedModel
from star_dist.inference.cached_model import CachedModel, ScaleLogits
from star_dist.inference.graphs import CudaGraphRecorder
from star_dist.inference.options import SamplingOptions
from star_dist.inference.sampler import SampledScale, sample_pictures
from star_dist.model.block_functions import compiled_functions
from star_dist.model.flops import forward_flops
from star_dist.model.layout import PackedLayout
from star_dist.model.star import STAR, pack_inputs
from star_dist.scales import ScaleSchedule
from star_dist.text import TextFeatures
from star_dist.tokenizer.config import VQVAEConfig
from star_dist.tokenizer.pixels import PixelDecoder
from star_dist.tokenizer.quantizer import MultiScaleQuantizer
from star_dist.tokenizer.vqvae import MultiScaleVQVAE
from star_dist.train.metrics import measured_matmul_flops

TEXT_TOKENS, EMPTY_TOKENS = 20, 2  # a caption of a dozen words, and the empty one's first and last token
COPIED_BYTES = 2**28
MATMUL_SIDE = {"cpu": 1024, "cuda": 4096}  # large enough for the device's full rate
OPTIONS = SamplingOptions(4.0, top_k=1)


def batches(text: str) -> list[int]:
    return [at_least(1)(number) for number in text.split(",")]


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--config", default="configs/d16.json", help="run configuration that gives sizes and scales")
    parser.add_argument("--quick", action="store_true", help="two blocks, one timed drawing")
    parser.add_argument(
        "--batches", type=batches, default="1", help="pictures drawn together, separated by commas (default 1)"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--repeats", type=at_least(1), default=5, help="timed drawings, of which the median counts (default 5)"
    )
    parser.add_argument("--compile", action="store_true", help="as launcher/sample.py --compile draws")
    parser.add_argument("--no-graphs", action="store_true", help="on a GPU: operation by operation, not as CUDA graphs")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive sampler out")
    parser.add_argument("--no-decode", action="store_true", help="leave the VQ-VAE decoder out")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this process's CPU time: on a CPU shared with others, one thread"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="results for scripts")
    arguments = parser.parse_args()

    device = chosen_device()
    if arguments.cpu_time and (device.type != "cpu" or torch.get_num_threads() != 1):
        raise UserError(f"--cpu-time is for one CPU thread, this is {device_name(device)}; set OMP_NUM_THREADS=1")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[arguments.dtype]
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = load_config(RunConfig, arguments.config, ["model.depth=2"] if arguments.quick else [])
    if arguments.quick:
        arguments.repeats = 1
    schedule = config.schedule
    model = random_model(config, device, dtype)
    torch.manual_seed(0)
    vqvae = MultiScaleVQVAE(VQVAEConfig(vocab_size=config.tokenizer.vocab_size, code_dim=config.tokenizer.code_dim))
    vqvae = vqvae.to(device).eval().requires_grad_(False)
    if arguments.compile:
        model.use_functions(compiled_functions(dynamic=True))
    text_tokens = config.text.max_tokens  # that the pipeline has room for
    if device.type == "cuda" and not arguments.no_graphs:
        reserve = RecordedModel(model, schedule, text_tokens, partial(CudaGraphRecorder, device)).reserve
    else:
        reserve = lambda rows, tokens: CachedModel(model, schedule, rows, max(tokens, text_tokens))
    bandwidth = measured_bandwidth(device, clock)
    print(f"{device_name(device)}: {dtype}, {bandwidth / 1e9:.3g} GB/s")

    rows, scale_rows = [], []
    for batch in arguments.batches:
        text, empty = random_text(config.text.width, [TEXT_TOKENS] * batch, [EMPTY_TOKENS])
        row, shares = measure(model, vqvae, schedule, text, empty, reserve, bandwidth, arguments, clock)
        row = {"resolution": config.resolution, "batch": batch} | row
        rows.append(row)
        scale_rows += [{"batch": batch} | share for share in shares]
    print_table("Drawing", rows)
    print_table("Share of every scale", scale_rows)
    tables = {"config": arguments.config, "dtype": str(dtype), "bandwidth": bandwidth}
    write_json(arguments.json, device, tables | {"drawing": rows, "scales": scale_rows})


def measure(
    model: STAR,
    vqvae: MultiScaleVQVAE,
    schedule: ScaleSchedule,
    text: TextFeatures,
    empty: TextFeatures,
    reserve: Callable[[int, int], ScaleLogits],
    bandwidth: float,
    arguments: argparse.Namespace,
    clock: Callable[[], float],
) -> tuple[dict[str, float | None], list[dict[str, float]]]:
    """One row of the table, and the rows of its scales."""
    batch, repeats, device = len(text.lengths), arguments.repeats, model.word_embed.weight.device
    quantizer, seeds = vqvae.quantize, list(range(batch))

    def draw(on_scale=None):
        return sample_pictures(
            model, quantizer, text, empty, schedule, OPTIONS, seeds, on_scale=on_scale, reserve=reserve
        )

    naive = partial(naive_tokens, model, quantizer, text, empty, schedule)
    rounds = []
    draw()
    if arguments.compile and not arguments.no_naive:
        naive()
    for _ in tqdm(range(repeats), desc=f"batch {batch}", unit="round"):
        dtype = model.word_embed.weight.dtype
        rate = measured_matmul_flops(device, MATMUL_SIDE[device.type], dtype=dtype, clock=clock)
        ours_s = median_seconds(draw, device, 1, warmup=0, clock=clock)
        naive_s = float("nan")
        if not arguments.no_naive:
            naive_s = median_seconds(naive, device, 1, warmup=0, clock=clock)
        rounds.append((rate, ours_s, naive_s))
    drawn = draw()
    if not arguments.no_naive and dtype_is_exact(model):
        assert torch.equal(drawn.tokens_BL, naive())
    decode_s = None
    if not arguments.no_decode:
        decode = PixelDecoder(vqvae)
        decode_s = median_seconds(lambda: decode(drawn.latent_BCHH), device, repeats, warmup=2, clock=clock)
    flops = batch * sum(
        sum(forward_flops(model.config, schedule, length).values()) for length in (TEXT_TOKENS, EMPTY_TOKENS)
    )
    weight = model.word_embed.weight
    weight_bytes = sum(parameter.numel() for parameter in model.parameters()) * weight.element_size()
    cached = (
        2 * 2 * batch * model.config.depth * model.config.width * weight.element_size()
    )  # keys, values; both halves
    read_bytes = len(schedule) * weight_bytes + cached * sum(schedule.ends)
    rates, ours, naive = (torch.tensor(column, dtype=torch.float64) for column in zip(*rounds))
    flops_s, read_s = flops / rates, read_bytes / bandwidth
    sample_s = ours.median().item()
    row = {
        "sample_s": sample_s,
        "decode_s": decode_s,
        "pictures_per_s": batch / (sample_s + (decode_s or 0)),
        "naive_s": None if arguments.no_naive else naive.median().item(),
        "naive_over_ours": None if arguments.no_naive else (naive / ours).median().item(),
        "matmul_tflops": rates.median().item() / 1e12,
        "flops_s": flops_s.median().item(),
        "read_s": read_s,
        "ours_over_flops": (ours / flops_s).median().item(),
        "ours_over_floor": (ours / flops_s.clamp(min=read_s)).median().item(),
    }
    return row, scale_shares(draw, schedule, device, clock)


def dtype_is_exact(model: STAR) -> bool:
    """Whether both samplers must agree on every token; in bf16 ties break differently."""
    return model.word_embed.weight.dtype == torch.float32


def scale_shares(
    draw, schedule: ScaleSchedule, device: torch.device, clock: Callable[[], float]
) -> list[dict[str, float]]:
    """Seconds of every scale in one drawing, each waited for."""
    times = []

    def note(drawn: SampledScale) -> None:
        wait_for(device)
        times.append(clock())

    wait_for(device)
    start = clock()
    draw(note)
    durations = [after - before for before, after in zip([start, *times], times)]
    return [
        {"scale": side, "tokens": length, "seconds": duration, "share": duration / sum(durations)}
        for side, length, duration in zip(schedule.sides, schedule.lengths, durations)
    ]


@torch.no_grad()
def naive_tokens(
    model: STAR, quantizer: MultiScaleQuantizer, text: TextFeatures, empty: TextFeatures, schedule: ScaleSchedule
) -> torch.Tensor:
    """The same tokens without a cache: all scales so far go through the model again at every scale; (B, L)."""
    batch = len(text.lengths)
    device = model.word_embed.weight.device
    both = TextFeatures.pack([text[i] for i in range(batch)] + [empty[0]] * batch)
    hidden, pooled = both.hidden_SW.to(device), both.pooled_BW.to(device)
    latent_BCHH = quantizer.empty_latent(batch, schedule)
    inputs = [latent_BCHH.new_zeros(batch, 1, model.config.code_dim)]
    tokens = []
    for scale, (start, end) in enumerate(zip(schedule.starts, schedule.ends)):
        so_far = ScaleSchedule(schedule.sides[: scale + 1])
        layout = PackedLayout.uniform(so_far, 2 * batch, both.lengths)
        inputs_TC = pack_inputs(torch.cat(inputs, dim=1)[:, 1:].repeat(2, 1, 1))
        logits = model(inputs_TC, hidden, pooled, layout=layout).view(2, batch, end, -1)[:, :, start:]
        strength = OPTIONS.guidance * scale / (len(schedule) - 1)
        tokens.append((logits[0] + strength * (logits[0] - logits[1])).argmax(-1))
        latent_BCHH, input_BNC = quantizer.next_input(latent_BCHH, tokens[-1], scale, schedule)
        if input_BNC is not None:
            inputs.append(input_BNC)
    return torch.cat(tokens, dim=1)


def random_model(config: RunConfig, device: torch.device, dtype: torch.dtype) -> STAR:
    with device:
        model = STAR(config.star_config()).to(dtype)
    fill_with_noise(model)
    return model.eval().requires_grad_(False)


def random_text(width: int, lengths: list[int], empty_lengths: list[int]) -> tuple[TextFeatures, TextFeatures]:
    generator = torch.Generator().manual_seed(0)

    def features(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(tokens, width, generator=generator), torch.randn(width, generator=generator)

    return TextFeatures.pack([features(n) for n in lengths]), TextFeatures.pack([features(n) for n in empty_lengths])


def measured_bandwidth(device: torch.device, clock: Callable[[], float]) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / median_seconds(lambda: target.copy_(source), device, 5, clock=clock)


if __name__ == "__main__":
    run_command(main)
