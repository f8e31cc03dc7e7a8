"""Initial weights of a tokenizer and the optimizers that train it."""

from __future__ import annotations

import torch
from torch import nn

from star_dist.config import TokenizerTrainConfig
from star_dist.tokenizer.muon import Muon
from star_dist.tokenizer.vqvae import MultiScaleVQVAE, ResidualBlock

CODEBOOK_STD = 0.3


@torch.no_grad()
def initialize(model: MultiScaleVQVAE, config: TokenizerTrainConfig) -> None:
    """Starts residual blocks as the identity but for a bias, and codes at the size of latents.

    What the schedule never uses is frozen.
    """
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv2.weight)
    nn.init.normal_(model.quantize.embedding.weight, std=CODEBOOK_STD)
    phis = model.quantize.quant_resi
    used = {id(phis.at(scale, len(config.schedule))) for scale in range(len(config.schedule))}
    for phi in phis.qresi_ls:
        phi.requires_grad_(id(phi) in used)


def build_optimizers(model: MultiScaleVQVAE, config: TokenizerTrainConfig) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimizers with their peak rates; each trained parameter is in exactly one.

    Muon takes the convolutions between the first and the last layer where `muon_learning_rate` is set; AdamW takes the
    rest. Biases, norms and codes do not decay.
    """
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim != 4:
            groups["no_decay"].append(parameter)
        elif config.muon_learning_rate is None or name in ("encoder.conv_in.weight", "decoder.conv_out.weight"):
            groups["decay"].append(parameter)
        else:
            groups["muon"].append(parameter)
    adamw = torch.optim.AdamW(
        [
            {"params": groups["decay"], "weight_decay": config.weight_decay},
            {"params": groups["no_decay"], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,  # one call in place of ten for each of a hundred small tensors
    )
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [(adamw, config.learning_rate)]
    if config.muon_learning_rate is not None:
        optimizers.append(
            (Muon(groups["muon"], config.muon_learning_rate, config.weight_decay), config.muon_learning_rate)
        )
    return optimizers
