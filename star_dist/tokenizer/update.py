"""One update of a tokenizer in training, and all that it changes: the model, its discriminator and their optimizers.

Shapes: B this rank's pictures of a step, C code dimension, V codebook size, S scales, H latent side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_dist.config import TokenizerTrainConfig
from star_dist.errors import UserError
from star_dist.learning_rate import learning_rate_fraction
from star_dist.tokenizer.codebook import HITS_DECAY, move_codes, residual_cells, unused_codes
from star_dist.tokenizer.losses import (
    PatchDiscriminator,
    PerceptualLoss,
    Quantized,
    adversarial_weight,
    discriminator_loss,
    quantize_for_training,
)
from star_dist.tokenizer.optim import build_optimizers, initialize
from star_dist.tokenizer.quantizer import full_float32
from star_dist.tokenizer.ranks import Ranks
from star_dist.tokenizer.vqvae import MultiScaleVQVAE

# Moving codes stops here, so that the decoder can settle on the codebook that it will be used with.
LAST_RESTART_FRACTION = 0.7


class Autoencoder(nn.Module):
    """A training step's forward pass as one module, which is what DistributedDataParallel wants."""

    def __init__(self, model: MultiScaleVQVAE, config: TokenizerTrainConfig) -> None:
        super().__init__()
        self.model = model
        self.schedule = config.schedule
        self.commitment = config.loss.commitment
        self.autocast = config.precision == "bf16"

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reconstructions (B, 3, side, side), quantization loss (), hits (S, V), unquantized latents (B, C, H, H)."""
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=self.autocast):
            latent = self.model.encode_latent(pictures).float()
            with full_float32(pictures.device):
                quantized: Quantized = quantize_for_training(
                    self.model.quantize, latent, self.schedule, self.commitment
                )
            reconstruction = self.model.decode_latent(quantized.latent).float()
        return reconstruction, quantized.loss, quantized.hits_SV, latent.detach()


class TokenizerUpdate:
    """Trains `model`; call it once a step, on every rank."""

    def __init__(self, config: TokenizerTrainConfig, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.device = ranks.device
        torch.manual_seed(config.seed)
        self.model = MultiScaleVQVAE(config.tokenizer)
        initialize(self.model, config)
        self.model.to(self.device, memory_format=torch.channels_last)  # 1.7 times faster convolutions on a CPU
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.autoencoder = ranks.parallel(Autoencoder(self.model, config))
        self.optimizers = build_optimizers(self.model, config)
        self.perceptual = None
        if config.loss.perceptual:
            self.perceptual = PerceptualLoss(Path(config.loss.vgg16_weights)).to(self.device)
        self.discriminator = None
        if config.loss.adversarial:
            self.discriminator = PatchDiscriminator().to(self.device)
            self.parallel_discriminator = ranks.parallel(self.discriminator)
            self.discriminator_optimizer = torch.optim.AdamW(
                self.discriminator.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=0.0
            )

    def __call__(
        self, step: int, pictures: Tensor, to_sum: Sequence[float]
    ) -> tuple[dict[str, Tensor | float], list[float]]:
        """One update of everything; pictures (B, 3, side, side) in [-1, 1], on any device.

        Returns what there is to report, of this rank where it is a tensor, and the sums of `to_sum` over ranks, which
        come with the one wait of a step for the device.

        Raises:
            UserError: the loss or a gradient is not finite; nothing was updated then.
        """
        config = self.config
        rate_fraction = learning_rate_fraction(step, config.steps, config.warmup_steps, "cosine", config.final_fraction)
        for optimizer, peak in self.optimizers:
            _set_learning_rate(optimizer, peak * rate_fraction)
        pictures = pictures.to(self.device).contiguous(memory_format=torch.channels_last)

        reconstruction, quantization_loss, hits_SV, latent_BCHH = self.autoencoder(pictures)
        values: dict[str, Tensor | float] = {"loss/quantization": quantization_loss}
        loss = self._reconstruction_loss(reconstruction, pictures, values)
        judged = self.discriminator is not None and step >= config.loss.adversarial_start
        if judged:
            loss = loss + self._adversarial_loss(loss, reconstruction, values)
        loss = values["loss/total"] = loss + quantization_loss
        loss.backward()

        norms = {"loss": torch.nn.utils.clip_grad_norm_(self.parameters, config.gradient_clipping)}
        losses = {"loss": loss}
        optimizers = [optimizer for optimizer, _ in self.optimizers]
        if judged:
            _set_learning_rate(self.discriminator_optimizer, config.learning_rate * rate_fraction)
            optimizers.append(self.discriminator_optimizer)
            values["loss/discriminator"] = self._judge(pictures, reconstruction.detach())
            losses["discriminator's loss"] = values["loss/discriminator"]
            norms["discriminator's loss"] = torch.nn.utils.clip_grad_norm_(
                self.discriminator.parameters(), config.gradient_clipping
            )
        norm, sums = self._finite_norm(step, losses, norms, to_sum)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        hits_SV = self.ranks.sum(hits_SV)
        self.model.quantize.ema_vocab_hit_SV.lerp_(hits_SV, 1 - HITS_DECAY)
        every = config.restart_codes_every
        if every and (step + 1) % every == 0 and step < LAST_RESTART_FRACTION * config.steps:
            values["codebook/restarted"] = float(self._restart_unused_codes(step, latent_BCHH))
        values["optim/learning_rate"] = config.learning_rate * rate_fraction
        values["optim/grad_norm"] = norm
        return values, sums

    def _reconstruction_loss(
        self, reconstruction: Tensor, pictures: Tensor, values: dict[str, Tensor | float]
    ) -> Tensor:
        weights = self.config.loss
        values["loss/l1"] = F.l1_loss(reconstruction, pictures)
        values["loss/l2"] = F.mse_loss(reconstruction, pictures)
        loss = weights.l1 * values["loss/l1"] + weights.l2 * values["loss/l2"]
        if self.perceptual is not None:
            values["loss/perceptual"] = self.perceptual(reconstruction, pictures)
            loss = loss + weights.perceptual * values["loss/perceptual"]
        return loss

    def _adversarial_loss(
        self, reconstruction_loss: Tensor, reconstruction: Tensor, values: dict[str, Tensor | float]
    ) -> Tensor:
        self.discriminator.requires_grad_(False)  # here it only judges; its own gradients come from `_judge`
        values["loss/adversarial"] = -self.discriminator(reconstruction).mean()
        self.discriminator.requires_grad_(True)
        last_weight = self.model.decoder.conv_out.weight
        weight = adversarial_weight(
            reconstruction_loss, values["loss/adversarial"], last_weight, mean_over_ranks=self.ranks.mean
        )
        return self.config.loss.adversarial * weight * values["loss/adversarial"]

    def _judge(self, pictures: Tensor, reconstruction: Tensor) -> Tensor:
        """Loss of the discriminator, whose gradients it leaves."""
        real_logits, fake_logits = self.parallel_discriminator(torch.cat([pictures, reconstruction])).chunk(2)
        loss = discriminator_loss(real_logits, fake_logits)
        loss.backward()
        return loss

    def _finite_norm(
        self, step: int, losses: dict[str, Tensor], norms: dict[str, Tensor], to_sum: Sequence[float]
    ) -> tuple[float, list[float]]:
        """The norm of the tokenizer's gradient, and the sums of `to_sum`.

        Norms are of the gradients of all ranks, so every rank stops at the same step.

        Raises:
            UserError: a loss or its gradient is not finite.
        """
        sums = self.ranks.sum(torch.tensor(to_sum, device=self.device))
        numbers = torch.cat([torch.stack(list(norms.values())), sums]).tolist()
        for (name, loss), norm in zip(losses.items(), numbers):
            if not math.isfinite(norm):
                raise UserError(
                    f"step {step + 1}: the {name} ({loss.item()}) or its gradient (norm {norm}) is not finite; the "
                    f"same command goes on from the checkpoint before; where it stops here again, lower learning_rate "
                    f"({self.config.learning_rate}) in another run_dir"
                )
        return numbers[0], numbers[len(norms) :]

    def _restart_unused_codes(self, step: int, latent_BCHH: Tensor) -> int:
        """Moves codes that nobody uses onto residuals of this step's pictures, alike on all ranks; returns how many."""
        quantizer = self.model.quantize
        unused = unused_codes(quantizer)
        cells_NC = self.ranks.gather(residual_cells(quantizer, latent_BCHH, self.config.schedule))
        draws = np.random.default_rng((self.config.seed, 2, step))
        move_codes(quantizer.embedding.weight, unused, cells_NC, draws, [optimizer for optimizer, _ in self.optimizers])
        return len(unused)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
        }
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave, among whatever else there is."""
        self.model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])


def _set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
