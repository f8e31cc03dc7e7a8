"""The only module that imports DeepSpeed: process group, partitioned model, optimizer step."""

from __future__ import annotations

import logging
import math
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from star_dist.config import RunConfig
from star_dist.device import rank_device
from star_dist.errors import UserError
from star_dist.model.block_functions import PLAIN, BlockFunctions, compiled_blocks, compiled_functions
from star_dist.model.compiling import compiler_problem
from star_dist.model.initialization import initial_value
from star_dist.model.star import STAR
from star_dist.process import ProcessInfo
from star_dist.train.control import TIMEOUT
from star_dist.train.optim import build_optimizer, parameter_groups
from star_dist.train.precision import attention_kernel
from star_dist.train.sharded_state import ShardedState

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param


class Engine:
    """A STAR model under DeepSpeed. Frozen modules (tokenizer, text encoder) stay outside.

    Built from the run's config: at ZeRO-3 weights are made partitioned (`zero.Init`), so no rank holds the whole model;
    `initial_weights` (fp32, by name) are then needed on rank 0 alone. attention: the attention kernel, for the log.
    state: what checkpoints hold.
    """

    def __init__(
        self, config: RunConfig, process: ProcessInfo, initial_weights: dict[str, Tensor] | None = None
    ) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        self.config = config
        self.process = process
        self.device = rank_device(process)
        functions = _block_functions(config, self.device)
        self.attention = attention_kernel(config, self.device, training=True, functions=functions)
        timeout = collective_timeout(config)
        _initialize_process_group(timeout)
        settings = config.deepspeed_config(process.world_size)
        partitioned = config.train.zero_stage == 3
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=partitioned):
            model = STAR(config.star_config(), config.model.attention, config.train.activation_checkpointing, functions)
        if not partitioned:
            model.to(self.device)
        # A gathered parameter takes rank 0's values, so the other ranks need none.
        writes = process.rank == 0 or not partitioned
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned), torch.no_grad():
                if writes and initial_weights is not None:
                    parameter.copy_(initial_weights[name])
                elif writes:
                    parameter.copy_(initial_value(name, parameter.shape, model.config, config.seed))
        groups = parameter_groups(model.named_parameters(), config.optimizer.weight_decay)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        group_of = {names[id(parameter)]: group["name"] for group in groups for parameter in group["params"]}
        # At stage 0 in fp32 DeepSpeed steps the optimizer as it is; elsewhere it clips and checks gradients itself.
        clips = config.train.zero_stage == 0 and config.train.precision == "fp32"
        optimizer = build_optimizer(groups, config.optimizer, clips)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        _set_timeout_of_all_groups(timeout)
        self.state = ShardedState(self._engine, config.train.zero_stage, process.rank, process.world_size, group_of)
        self.state.undo_first_update()

    @property
    def model(self) -> STAR:
        return self._engine.module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._engine(*inputs, **options)

    def train(self, training: bool = True) -> None:
        self._engine.train(training)

    def backward(self, loss_sum: Tensor) -> None:
        """Adds the gradient of this micro-batch's summed token losses, over the tokens of the whole global step.

        DeepSpeed averages over ranks, so the mean over all tokens of the step needs the factor world_size.
        """
        loss = loss_sum * (self.process.world_size / self.config.tokens_per_step)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> None:
        """Ends a micro-batch; at the accumulation boundary updates the weights, or skips a step that is not finite."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped because a gradient was not finite."""
        return self._engine.skipped_steps

    def gradient_norm(self) -> float | None:
        """Norm over all parameters of the last step's gradient before clipping; None if that step was skipped."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None or not math.isfinite(norm) else float(norm)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        torch.distributed.all_reduce(values)
        return values

    def check_all_ranks_agree(self, value: int, what: str) -> None:
        """Compares what every rank found in the run folder.

        Raises:
            UserError: they found different values, because they see different folders.
        """
        extremes = torch.tensor([value, -value], device=self.device)
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
        largest, smallest = int(extremes[0]), -int(extremes[1])
        if largest != smallest:
            raise UserError(
                f"ranks disagree on {what}: between {smallest} and {largest}; run_dir {self.config.run_dir} must be "
                f"on a file system that all nodes share"
            )

    def barrier(self) -> None:
        torch.distributed.barrier()

    def full_weights(self) -> dict[str, Tensor] | None:
        """All weights, from the fp32 masters where they are parted, on the CPU of rank 0. Every rank must call this.

        Returns None on the other ranks. One parameter at a time is whole on the device, so the peak is the model's
        fp32 size on one host.
        """
        weights: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            full = parameter.detach() if full is None else full
            if self.process.rank == 0:
                weights[name] = full.detach().float().cpu().clone().view(_full_shape(parameter))
        return weights if self.process.rank == 0 else None

    def close(self) -> None:
        """Ends the traffic between ranks, in order: all must have come to the same place."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _block_functions(config: RunConfig, device: torch.device) -> BlockFunctions:
    """Raises UserError where PyTorch's compiler is wanted and does not work."""
    if config.train.compile == "none":
        return PLAIN
    if problem := compiler_problem(device):
        raise UserError(
            f"train.compile is {config.train.compile}, but PyTorch's compiler does not work here: {problem}; install a "
            f"C++ compiler, or set train.compile to none"
        )
    return compiled_blocks() if config.train.compile == "blocks" else compiled_functions()


def collective_timeout(config: RunConfig) -> timedelta:
    """How long ranks wait for one another: longer than the watchdog does, which says more about a hang."""
    if not config.health.hang_timeout_s:
        return TIMEOUT
    return max(timedelta(seconds=2 * config.health.hang_timeout_s), torch.distributed.default_pg_timeout)


def _set_timeout_of_all_groups(timeout: timedelta) -> None:
    """DeepSpeed makes groups of its own, with PyTorch's default of ten minutes on NCCL."""
    c10d = torch.distributed.distributed_c10d
    set_timeout = getattr(torch.distributed, "set_timeout", None) or c10d._set_pg_timeout  # public since 2.15
    for group in list(c10d._world.pg_map):
        set_timeout(timeout, group)


def _initialize_process_group(timeout: timedelta) -> None:
    if torch.cuda.is_available():
        deepspeed.init_distributed("nccl", timeout=timeout)
        return
    # DeepSpeed's shared-memory op for CPUs compiles for half a minute and leaks 69 MB a rank in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=timeout)
