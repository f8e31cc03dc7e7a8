"""Training losses of the tokenizer: reconstruction, quantization, and the optional perceptual and adversarial terms.

Shapes: B batch, C code dimension, V codebook size, H latent side; pictures are (B, 3, side, side) in [-1, 1].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_dist.config.tokenizer import DISCRIMINATOR_KERNEL, DISCRIMINATOR_PADDING, DISCRIMINATOR_STRIDES
from star_dist.errors import UserError
from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.quantizer import MultiScaleQuantizer
from star_dist.weights import check_names_and_shapes, read_weights


@dataclass
class Quantized:
    """latent: straight-through quantized latent (B, C, H, H). loss: scalar. hits_SV: uses of a code by a scale."""

    latent: Tensor
    loss: Tensor
    hits_SV: Tensor


def quantize_for_training(
    quantizer: MultiScaleQuantizer, latent_BCHH: Tensor, schedule: ScaleSchedule, commitment: float
) -> Quantized:
    """Quantizes with gradients: straight-through to the encoder, VQ loss of every partial sum to codebook and phi.

    The loss is the mean over scales of `mse(partial sum, latent)` for codebook and phi, plus `commitment` times the
    same distance for the encoder (VAR, section 3.2; van den Oord et al. 2017, equation 3).
    """
    latent_BCHH = latent_BCHH.float()
    target_BCHH = latent_BCHH.detach()
    partial_BCHH = torch.zeros_like(target_BCHH)
    loss = latent_BCHH.new_zeros(())
    hits = []
    for tokens_BN, contribution_BCHH in quantizer.residual_steps(latent_BCHH, schedule):
        partial_BCHH = partial_BCHH + contribution_BCHH
        loss = loss + F.mse_loss(partial_BCHH, target_BCHH)
        loss = loss + commitment * F.mse_loss(latent_BCHH, partial_BCHH.detach())
        hits.append(torch.bincount(tokens_BN.flatten(), minlength=quantizer.vocab_size).float())
    straight_through_BCHH = latent_BCHH + (partial_BCHH.detach() - target_BCHH)
    return Quantized(straight_through_BCHH, loss / len(schedule), torch.stack(hits))


class PerceptualLoss(nn.Module):
    """Distance between VGG-16 features of two pictures (Johnson et al. 2016), averaged over four depths.

    Raises:
        UserError: torchvision is not installed, or the weights file is missing or is not torchvision's VGG-16.
    """

    LAYERS = (3, 8, 15, 22)  # relu1_2, relu2_2, relu3_3, relu4_3 in torchvision's vgg16().features

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            from torchvision.models import vgg16
        except ImportError:
            raise UserError("loss.perceptual needs torchvision; install it, or set loss.perceptual to 0") from None

        with torch.device("meta"):
            network = vgg16()
        state = read_weights(weights)
        check_names_and_shapes(state, network.state_dict(), f"{weights} as torchvision's VGG-16 (loss.vgg16_weights)")
        network.load_state_dict(state, assign=True)
        self.features = network.features[: self.LAYERS[-1] + 1].eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            target_features = list(self._unit_features(target))
        distance = image.new_zeros(())
        for features, wanted in zip(self._unit_features(image), target_features):
            distance = distance + (features - wanted).square().sum(1).mean()
        return distance / len(self.LAYERS)

    def _unit_features(self, pictures: Tensor) -> Iterator[Tensor]:
        """Features at each of `LAYERS`, of length 1 in every cell."""
        x = (pictures * 0.5 + 0.5 - self.mean) / self.std
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.LAYERS:
                yield F.normalize(x, dim=1)


class PatchDiscriminator(nn.Sequential):
    """Judges overlapping patches of a picture as real or decoded (PatchGAN, Isola et al. 2017)."""

    def __init__(self, channels: int = 64) -> None:
        convolution = functools.partial(nn.Conv2d, kernel_size=DISCRIMINATOR_KERNEL, padding=DISCRIMINATOR_PADDING)
        first, *inner, last = DISCRIMINATOR_STRIDES
        layers: list[nn.Module] = [convolution(3, channels, stride=first), nn.LeakyReLU(0.2)]
        width = channels
        for stride in inner:
            wider = min(2 * width, 8 * channels)
            layers += [convolution(width, wider, stride=stride, bias=False)]
            layers += [nn.GroupNorm(32 if wider % 32 == 0 else 1, wider), nn.LeakyReLU(0.2)]
            width = wider
        super().__init__(*layers, convolution(width, 1, stride=last))


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adversarial_weight(
    reconstruction_loss: Tensor,
    adversarial_loss: Tensor,
    last_weight: Tensor,
    mean_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """Weight at which both losses pull equally on the decoder's last layer (VQGAN, Esser et al. 2021, equation 7).

    The pulls are those of the whole batch, so the weight does not depend on how ranks share it.
    """
    (reconstruction_gradient,) = torch.autograd.grad(reconstruction_loss, last_weight, retain_graph=True)
    (adversarial_gradient,) = torch.autograd.grad(adversarial_loss, last_weight, retain_graph=True)
    reconstruction_gradient = mean_over_ranks(reconstruction_gradient)
    adversarial_gradient = mean_over_ranks(adversarial_gradient)
    return (reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0, 1e4).detach()
