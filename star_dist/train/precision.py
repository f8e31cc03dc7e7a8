"""What a run's models compute in, and with which attention kernel: the same in training and in evaluation."""

from __future__ import annotations

import torch

from star_dist.config import RunConfig
from star_dist.errors import UserError
from star_dist.model.attention import choose_kernel
from star_dist.model.block_functions import PLAIN, BlockFunctions
from star_dist.model.kernels.base import KernelUnavailable


def run_dtype(config: RunConfig) -> torch.dtype:
    """Of the transformer's weights and activations between optimizer steps."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def frozen_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """Of what is not trained: that of the run on a GPU, float32 on a CPU without fast bf16."""
    return run_dtype(config) if device.type == "cuda" else torch.float32


def attention_kernel(
    config: RunConfig, device: torch.device, *, training: bool, functions: BlockFunctions = PLAIN
) -> str:
    """What the run's attention kernel is on this machine, with the functions that its blocks run with.

    Raises:
        UserError: the named kernel cannot run here.
    """
    name = config.model.attention
    try:
        kernel = choose_kernel(
            name,
            device,
            run_dtype(config),
            training=training,
            functions=functions,
            checkpointing=config.train.activation_checkpointing if training else "none",
        )
    except KernelUnavailable as error:
        raise UserError(str(error)) from None
    return kernel.description + (", chosen by auto" if name == "auto" else "")
