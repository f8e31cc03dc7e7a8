"""What a run will need, from its configuration: memory per GPU by part, step time, communication, days, storage.

Imports no torch, so that it runs on a login node. Everything here is reckoned, not measured; what each number rests on
stands beside it. GiB are 2^30 bytes, GB and TB powers of ten.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from star_dist.config import RunConfig
from star_dist.config.deepspeed import accepted_zero_stages, look_up
from star_dist.errors import UserError
from star_dist.model.flops import training_flops
from star_dist.model.size import FLOAT32_BYTES, activation_bytes, parameter_count
from star_dist.train.gpu_peaks import GPU_PEAK_TFLOPS

# DeepSpeed 0.19's defaults, in elements and GPUs (https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training)
DEFAULT_ZERO = {
    "reduce_bucket_size": 5e8,
    "stage3_max_live_parameters": 1e9,
    "sub_group_size": 1e9,
    "zero_hpz_partition_size": 1,
}
# Share of a GPU's memory that what is reckoned here may take; the rest is left to what is not: the CUDA context, NCCL's
# buffers, library workspaces and fragmentation. A guess with room: of an H200's 140.4 GiB steps that held 123 ran.
USABLE_MEMORY = 0.92
CAPTION_BYTES = 200  # of one sample beside its tokens: caption, key and MDS offsets


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB as nvidia-smi shows it, and of the data sheet dense bf16 peak in TFLOP/s, link inside a node and to
    other nodes in GB/s.

    links: one direction per GPU; NVLink inside, 400 Gbit/s InfiniBand per GPU outside (PCIe and 100 Gbit/s for L40S).
    """

    memory_gib: float
    peak_tflops: float
    node_link: float
    cluster_link: float


GPUS = {
    "a100-40": Gpu(40.0, GPU_PEAK_TFLOPS["A100"], 300, 25),
    "a100-80": Gpu(80.0, GPU_PEAK_TFLOPS["A100"], 300, 25),
    "h100": Gpu(79.6, GPU_PEAK_TFLOPS["H100"], 450, 50),
    "h200": Gpu(140.4, GPU_PEAK_TFLOPS["H200"], 450, 50),
    "b200": Gpu(179.1, GPU_PEAK_TFLOPS["B200"], 900, 50),
    "l40s": Gpu(45.0, GPU_PEAK_TFLOPS["L40S"], 32, 12.5),
}


def bytes_per_value(config: RunConfig) -> int:
    """Of weights in use and activations."""
    return 2 if config.train.precision == "bf16" else FLOAT32_BYTES


def state_bytes(config: RunConfig, gpus: int) -> dict[str, float]:
    """Weights, gradients, fp32 masters and Adam moments per GPU, as the ZeRO stage partitions them, but for what is
    offloaded to the CPU; with hpZ also its second copy of the weights, which the GPUs of a group share.
    """
    parameters, low, stage = parameter_count(config.star_config()), bytes_per_value(config), config.train.zero_stage
    masters = 0 if stage == 0 and low == FLOAT32_BYTES else FLOAT32_BYTES  # from stage 1 on copies also in fp32
    added_in_fp32 = look_up(config.deepspeed, "data_types.grad_accum_dtype") == "fp32"
    on_gpu = {
        part: look_up(config.deepspeed, f"zero_optimization.{key}.device") != "cpu"
        for part, key in (("parameters", "offload_param"), ("optimizer", "offload_optimizer"))
    }
    parts = {
        "parameters": on_gpu["parameters"] * parameters * low / (gpus if stage >= 3 else 1),
        "gradients": parameters * (FLOAT32_BYTES if added_in_fp32 else low) / (gpus if stage >= 2 else 1),
        "optimizer": on_gpu["optimizer"] * parameters * (masters + 2 * FLOAT32_BYTES) / (gpus if stage >= 1 else 1),
    }
    group = zero_number(config, "zero_hpz_partition_size")
    if stage == 3 and group > 1:
        parts["second copy (hpZ)"] = parameters * low / group
    return parts


def zero_number(config: RunConfig, name: str) -> float:
    """A number of `deepspeed.zero_optimization`, by default DeepSpeed's.

    Raises:
        UserError: the run's config gives another kind of value: "auto", which DeepSpeed takes for its default, or what
            it refuses or reads in its own way when the training starts.
    """
    value = config.deepspeed.get("zero_optimization", {}).get(name, DEFAULT_ZERO[name])
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(
            f"deepspeed.zero_optimization.{name} must be a number that is not negative, got {json.dumps(value)}; "
            f"change it, or remove it for DeepSpeed's {DEFAULT_ZERO[name]:g}"
        )
    return value


def checkpoint_bytes(config: RunConfig) -> int:
    """Weights and both Adam moments in fp32, over all ranks."""
    return 3 * FLOAT32_BYTES * parameter_count(config.star_config())


def buffer_bytes(config: RunConfig, gpus: int) -> dict[str, float]:
    """What DeepSpeed holds beside the state: the bucket of gradients, made whole whatever the model's size (at stage 0
    no larger than all gradients), and at stage 3 the gathered weights, those fetched ahead among them.
    """
    stage, bucket = config.train.zero_stage, zero_number(config, "reduce_bucket_size")
    parameters, low = parameter_count(config.star_config()), bytes_per_value(config)
    if stage == 0:
        return {"communication buckets": min(bucket, parameters) * low} if gpus > 1 else {}
    buckets = 2 if look_up(config.deepspeed, "zero_optimization.overlap_comm") and stage < 3 else 1
    parts = {"communication buckets": buckets * bucket * low}
    if stage == 3 and gpus > 1:
        parts["gathered weights"] = min(zero_number(config, "stage3_max_live_parameters"), parameters) * low
    return parts


def update_bytes(config: RunConfig, gpus: int) -> float:
    """What the optimizer's step holds beside the states: copies of the gradients that a GPU updates with, in one piece
    (from stage 1 on) and in fp32. At stage 1 gradients of what other GPUs update are gone by then.
    """
    parameters, low, stage = parameter_count(config.star_config()), bytes_per_value(config), config.train.zero_stage
    if look_up(config.deepspeed, "zero_optimization.offload_optimizer.device") == "cpu":
        return 0.0
    if stage == 0:
        return parameters * FLOAT32_BYTES
    updated = parameters / gpus
    if stage == 3:
        updated = min(updated, zero_number(config, "sub_group_size"))
    copies = updated * (low if low == FLOAT32_BYTES else low + FLOAT32_BYTES)
    return max(copies - (parameters * low * (gpus - 1) / gpus if stage == 1 else 0), 0.0)


def memory_bytes(config: RunConfig, gpus: int, micro_batch: int) -> dict[str, float]:
    """Memory per GPU by part; frozen tokenizer and text encoder not counted (their files are not opened).

    The optimizer's step counts with what it needs beyond the backward pass, which is over by then.
    """
    star = config.star_config()
    buffers = buffer_bytes(config, gpus)
    parts = state_bytes(config, gpus) | buffers
    activations = activation_bytes(
        star,
        micro_batch * config.training_schedule.num_tokens,
        bytes_per_value(config),
        config.train.activation_checkpointing,
    )
    parts |= {
        "activations": activations["kept for the backward pass"],
        "head or block": activations["head or block"],
    }
    freed = sum(activations.values()) + (0 if config.train.zero_stage == 3 else sum(buffers.values()))
    more = update_bytes(config, gpus) - freed
    return parts | ({"optimizer step": more} if more > 0 else {})


def usable_bytes(memory_gib: float) -> float:
    """Of a GPU's memory, for what `memory_bytes` counts."""
    return USABLE_MEMORY * memory_gib * 2**30


def largest_micro_batch(config: RunConfig, gpus: int, memory_gib: float) -> int | None:
    """Largest micro-batch that fits and divides the global batch evenly over the GPUs; None if not even 1 fits."""
    per_gpu = config.train.global_batch // gpus
    fits = [
        size
        for size in range(1, per_gpu + 1)
        if per_gpu % size == 0 and sum(memory_bytes(config, gpus, size).values()) <= usable_bytes(memory_gib)
    ]
    return fits[-1] if fits else None


def at_stage(config: RunConfig, zero_stage: int) -> RunConfig:
    """The same run at another ZeRO stage."""
    return config.model_copy(update={"train": config.train.model_copy(update={"zero_stage": zero_stage})})


def recommended_zero_stage(config: RunConfig, gpus: int, memory_gib: float) -> int | None:
    """The stage that communicates least of those where the run's micro-batch fits; of equals one below 3, where whole
    blocks compile, and of those the one that needs least memory. None if no stage fits.

    On several GPUs not stage 0: once a step it sends a third less than stage 1, and every GPU then holds and updates
    all optimizer states.
    """

    def costs(stage: int) -> tuple[float, bool, float, int]:
        run = at_stage(config, stage)
        memory = sum(memory_bytes(run, gpus, config.train.micro_batch).values())
        return communication_bytes(run, gpus), stage == 3, memory, stage

    train = config.train
    stages = accepted_zero_stages(config.deepspeed, train.possible_zero_stages, train.precision)
    stages = [stage for stage in stages if stage or gpus == 1]
    fitting = [cost for cost in map(costs, stages) if cost[2] <= usable_bytes(memory_gib)]
    return min(fitting)[3] if fitting else None


def recommended_compile(config: RunConfig, zero_stage: int | None) -> str:
    """`train.compile` for the recommended stage: whole blocks wherever ZeRO leaves weights in place, and with selective
    checkpointing where the compiler sees attention (`star_dist.model.attention.choose_kernel` refuses it elsewhere).

    On an H200 they made d30 at 256 pixels 1.8 times as fast, and functions gave the step nothing (docs/performance.md).
    """
    sees_attention = config.model.attention in ("auto", "flex") and config.train.precision == "bf16"
    if config.train.activation_checkpointing == "selective" and not sees_attention:
        return "functions"
    return "functions" if zero_stage in (None, 3) else "blocks"


def communication_bytes(config: RunConfig, gpus: int) -> float:
    """Bytes that each GPU sends in one optimizer step (ring collectives move (n - 1) / n of a tensor).

    Stage 0: gradients are all-reduced once. ZeRO-1: the same, as DeepSpeed 0.19 does where several ranks share a bucket
    (`use_multi_rank_bucket_allreduce`), and updated weights are gathered; ZeRO-2 all-reduces in every micro-batch.
    ZeRO-3: every micro-batch gathers the weights forwards and backwards and reduces the gradients; hpZ, whose gathers
    of the backward pass stay inside a group, sends as much. Stages 0 to 2 were counted on two ranks.
    """
    size = parameter_count(config.star_config()) * bytes_per_value(config) * (gpus - 1) / gpus
    stage, rounds = config.train.zero_stage, config.accumulation_steps(gpus)
    return size * {0: 2, 1: 3, 2: 1 + 2 * rounds, 3: 3 * rounds}[stage]


def plan(
    config: RunConfig, gpus: int, gpu_name: str, gpus_per_node: int, mfu: float, pictures: float
) -> dict[str, Any]:
    """Everything at once, in SI units, as `launcher/plan.py --json` writes it."""
    gpu = GPUS[gpu_name]
    star, schedule = config.star_config(), config.schedule
    memory = memory_bytes(config, gpus, config.train.micro_batch)
    flops_per_picture = training_flops(star, config.training_schedule, config.text.max_tokens)
    step_flops = flops_per_picture * config.train.global_batch
    compute_s = step_flops / (gpus * gpu.peak_tflops * 1e12 * mfu)
    sent = communication_bytes(config, gpus)
    link = gpu.node_link if gpus <= gpus_per_node else gpu.cluster_link
    communication_s = sent / (link * 1e9)
    step_s = max(compute_s, communication_s)
    images_per_s = config.train.global_batch / step_s
    best_stage = recommended_zero_stage(config, gpus, gpu.memory_gib)
    token_bytes = schedule.num_tokens * (2 if config.tokenizer.vocab_size <= 2**16 else 4)
    feature_bytes = 2 * config.text.width * (config.text.max_tokens + 1)
    return {
        "parameters": parameter_count(star),
        "tokens_per_picture": schedule.num_tokens,
        "trained_tokens_per_picture": config.training_schedule.num_tokens,
        "visible_pairs_share": schedule.visible_pairs / schedule.num_tokens**2,
        "micro_batch": config.train.micro_batch,
        "accumulation_steps": config.accumulation_steps(gpus),
        "memory_bytes": memory,
        "memory_total_bytes": sum(memory.values()),
        "usable_memory_bytes": usable_bytes(gpu.memory_gib),
        "largest_micro_batch": largest_micro_batch(config, gpus, gpu.memory_gib),
        "zero_stage": config.train.zero_stage,
        "recommended_zero_stage": best_stage,
        "largest_micro_batch_there": None
        if best_stage is None
        else largest_micro_batch(at_stage(config, best_stage), gpus, gpu.memory_gib),
        "compile": config.train.compile,
        "recommended_compile": recommended_compile(config, best_stage),
        "flops_per_picture": flops_per_picture,
        "flops_per_step": step_flops,
        "assumed_mfu": mfu,
        "compute_s": compute_s,
        "communication_bytes": sent,
        "link_gb_per_s": link,
        "communication_s": communication_s,
        "step_s": step_s,
        "images_per_s": images_per_s,
        "pictures": pictures,
        "days": pictures / images_per_s / 86400,
        "gpu_hours": gpus * pictures / images_per_s / 3600,
        "storage_bytes_per_picture": {
            "tokens and caption": token_bytes + CAPTION_BYTES,
            "text features": feature_bytes,
        },
    }
