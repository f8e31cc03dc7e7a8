"""What the `deepspeed` section of a run may hold: knobs of DeepSpeed beside what star-dist derives."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable
from typing import Any

# What star-dist derives from its own sections; setting it again here would contradict the run's own config.
DERIVED_KEYS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.gradient_clipping",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "zero_optimization.stage": "train.zero_stage",
    "steps_per_print": "logging.every",
    "wandb": "logging.wandb",
}

# Sections of DeepSpeed's own configuration that a run may set; DeepSpeed itself ignores a misspelt one in silence.
SECTIONS = (
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "data_types",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "tensorboard",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_optimization",
)

# Fields of DeepSpeed 0.19's DeepSpeedZeroConfig (tests/test_config.py compares), without what it has deprecated and
# what `star_dist.train.sharded_state` cannot read or this model has no use for: offloading to NVMe, gradients in
# round-robin order, ZenFlow, MuON.
ZERO_KEYS = (
    "allgather_bucket_size",
    "allgather_partitions",
    "compute_grad_norm",
    "contiguous_gradients",
    "enable_sanity_checks",
    "ignore_unused_parameters",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "override_module_apply",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage",
    "stage3_allgather_sequential",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)


def check_deepspeed_section(section: dict[str, Any], zero_stage: int, precision: str) -> None:
    """Refuses what DeepSpeed would ignore, or raise about long after the start.

    Raises:
        ValueError: an unknown or derived key, or a value that the run cannot work with.
    """
    _check_names("deepspeed", section, (*SECTIONS, *DERIVED_KEYS), SECTIONS)
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"deepspeed.zero_optimization must be an object, got {zero!r}")
    if "round_robin_gradients" in zero:
        raise ValueError(
            "deepspeed.zero_optimization.round_robin_gradients orders the optimizer's masters otherwise than "
            "DeepSpeed's own map of them says, so that checkpoints would hold weights under wrong names; remove it"
        )
    _check_names("deepspeed.zero_optimization", zero, ZERO_KEYS, ZERO_KEYS)
    for key, source in DERIVED_KEYS.items():
        if look_up(section, key) is not None:
            raise ValueError(f"deepspeed.{key} is what star-dist sets; use {source}, and remove it here")
    for key, first_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        device = look_up(zero, f"{key}.device")
        if device == "nvme":
            raise ValueError(
                f"deepspeed.zero_optimization.{key}.device is nvme, which checkpoints cannot read; use cpu"
            )
        if device not in (None, "none") and zero_stage < first_stage:
            raise ValueError(
                f"deepspeed.zero_optimization.{key}.device is {device}, but DeepSpeed ignores it at train.zero_stage "
                f"{zero_stage}; set the stage to {first_stage} or more, or remove it"
            )
    ratio = look_up(zero, "offload_optimizer.ratio")
    if ratio not in (None, 1):
        raise ValueError(
            f"deepspeed.zero_optimization.offload_optimizer.ratio is {ratio}, but DeepSpeed offloads a part with an "
            f"optimizer of its own only; remove it"
        )
    for key, neutral in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
        value = section.get(key, neutral)
        if value != neutral and zero_stage >= 2 and zero.get("reduce_scatter", True):
            raise ValueError(
                f"deepspeed.{key} is {value}, but DeepSpeed cannot do that at train.zero_stage {zero_stage} with "
                f"zero_optimization.reduce_scatter; set that to false, or remove {key}"
            )
    accumulation = look_up(section, "data_types.grad_accum_dtype")
    if accumulation is not None and (accumulation != "fp32" or precision != "bf16" or zero_stage < 2):
        raise ValueError(
            f"deepspeed.data_types.grad_accum_dtype is {accumulation!r} with train.precision {precision} at "
            f"train.zero_stage {zero_stage}; it can be fp32, with bf16 at stage 2 or 3, and is precision's own "
            f"otherwise: remove it"
        )


def accepted_zero_stages(section: dict[str, Any], stages: Iterable[int], precision: str) -> list[int]:
    """Those of some stages at which `check_deepspeed_section` refuses nothing."""
    accepted = []
    for stage in stages:
        with contextlib.suppress(ValueError):
            check_deepspeed_section(section, stage, precision)
            accepted.append(stage)
    return accepted


def _check_names(place: str, values: dict[str, Any], allowed: Iterable[str], suggested: Iterable[str]) -> None:
    for key in values:
        if key not in allowed:
            nearest = difflib.get_close_matches(key, suggested, n=1, cutoff=0.4)
            hint = f"; did you mean {place}.{nearest[0]}?" if nearest else ""
            raise ValueError(f"unknown key {place}.{key}{hint}")


def look_up(values: dict[str, Any], dotted: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for name in dotted.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values
