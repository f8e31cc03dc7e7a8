"""What a run would be, without running it: no GPU, no data, no weights; the model is built on the meta device."""

from __future__ import annotations

import json

import torch

from star_dist.config import RunConfig, dump_config
from star_dist.model.flops import forward_flops, training_flops
from star_dist.model.star import STAR

GIB = 2**30
BYTES_FP32 = 4


def describe(config: RunConfig, world_size: int) -> str:
    """The resolved config, parameters, FLOPs, tokens, memory per GPU and the DeepSpeed config, as text for people."""
    star = config.star_config()
    with torch.device("meta"):
        model = STAR(star, config.model.attention)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text_tokens = config.text.max_tokens
    forward = forward_flops(star, config.schedule, text_tokens)
    training = training_flops(star, config.schedule, text_tokens)
    memory = state_memory_bytes(config, parameters, world_size)
    lines = [
        dump_config(config),
        "",
        f"model              depth {star.depth}, width {star.width}, heads {star.heads}, {parameters:,} parameters",
        f"attention kernel   {model.attention}",
        f"tokens per picture {config.schedule.num_tokens:,} over {len(config.scales)} scales; "
        f"{config.schedule.visible_pairs / config.schedule.num_tokens**2:.3f} of all pairs visible",
        f"FLOPs per picture  {sum(forward.values()):.3e} forward, {training:.3e} training "
        f"(captions of {text_tokens} tokens, visible pairs only)",
        f"per step           {config.train.global_batch:,} pictures, {config.tokens_per_step:,} tokens, "
        f"{config.train.global_batch * training:.3e} FLOPs",
        f"on {world_size} GPU(s)        {config.accumulation_steps(world_size)} micro-batches of "
        f"{config.train.micro_batch} pictures each",
        "state per GPU      "
        + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in memory.items())
        + f", together {sum(memory.values()) / GIB:.2f} GiB (activations, buffers and the frozen modules come on top)",
        "",
        "DeepSpeed config:",
        json.dumps(config.deepspeed_config(world_size), indent=2),
    ]
    return "\n".join(lines)


def state_memory_bytes(config: RunConfig, parameters: int, world_size: int) -> dict[str, float]:
    """Weights, gradients, fp32 masters and Adam moments per GPU, as the ZeRO stage partitions them."""
    low = 2 if config.train.precision == "bf16" else BYTES_FP32
    stage = config.train.zero_stage
    masters = BYTES_FP32 if config.train.precision == "bf16" else 0
    return {
        "weights": parameters * low / (world_size if stage >= 3 else 1),
        "gradients": parameters * low / (world_size if stage >= 2 else 1),
        "optimizer": parameters * (masters + 2 * BYTES_FP32) / (world_size if stage >= 1 else 1),
    }
