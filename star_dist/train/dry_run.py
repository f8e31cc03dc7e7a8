"""What a run would be, without running it: no GPU, no data, no weights. Imports no torch."""

from __future__ import annotations

import json

from star_dist.config import RunConfig, dump_config
from star_dist.model.flops import forward_flops, training_flops
from star_dist.model.size import parameter_count
from star_dist.train.planning import memory_bytes

GIB = 2**30


def describe(config: RunConfig, world_size: int) -> str:
    """The resolved config, parameters, FLOPs, tokens, memory per GPU and the DeepSpeed config, as text for people."""
    star = config.star_config()
    text_tokens = config.text.max_tokens
    forward = forward_flops(star, config.training_schedule, text_tokens)
    training = training_flops(star, config.training_schedule, text_tokens)
    memory = memory_bytes(config, world_size, config.train.micro_batch)
    lines = [
        dump_config(config),
        "",
        f"model              depth {star.depth}, width {star.width}, heads {star.heads}, "
        f"{parameter_count(star):,} parameters",
        f"attention kernel   {config.model.attention}",
        f"tokens per picture {config.schedule.num_tokens:,} over {len(config.scales)} scales; "
        f"{config.schedule.visible_pairs / config.schedule.num_tokens**2:.3f} of all pairs visible",
        f"FLOPs per picture  {sum(forward.values()):.3e} forward, {training:.3e} training "
        f"(captions of {text_tokens} tokens, visible pairs only)",
        f"per step           {config.train.global_batch:,} pictures, "
        f"{config.train.global_batch * config.training_schedule.num_tokens:,} tokens, "
        f"{config.train.global_batch * training:.3e} FLOPs",
        f"on {world_size} GPU(s)        {config.accumulation_steps(world_size)} micro-batches of "
        f"{config.train.micro_batch} pictures each",
        "memory per GPU     "
        + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in memory.items())
        + f", together {sum(memory.values()) / GIB:.2f} GiB (the frozen tokenizer and text encoder come on top)",
        "",
        "DeepSpeed config:",
        json.dumps(config.deepspeed_config(world_size), indent=2),
    ]
    return "\n".join(lines)
