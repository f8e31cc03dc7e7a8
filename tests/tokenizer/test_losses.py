"""The tokenizer's losses against their published formulas, and how a training step adds them up."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.config import VQVAEConfig
from star_dist.tokenizer.losses import PerceptualLoss, adversarial_weight, discriminator_loss, quantize_for_training
from star_dist.tokenizer.quantizer import MultiScaleQuantizer
from star_dist.tokenizer.ranks import Ranks
from star_dist.tokenizer.update import TokenizerUpdate
from tests.tokenizer.conftest import MakeConfig

SCHEDULE = ScaleSchedule((1, 2, 4))


def random_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))


def test_quantization_loss_pulls_codes_fully_and_the_encoder_by_the_commitment() -> None:
    """van den Oord et al. 2017, equation 3, for the partial sum of every scale: |sg[z] - q|^2 + beta |z - sg[q]|^2."""
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(VQVAEConfig(vocab_size=16, code_dim=4, scales=SCHEDULE.sides))
    latent = torch.randn(2, 4, 4, 4, requires_grad=True)
    tokens_BL, commitment = quantizer.encode(latent, SCHEDULE), 0.25
    parts = [
        quantizer.contribution(tokens_BL[:, start:end], scale, SCHEDULE)
        for scale, (start, end) in enumerate(zip(SCHEDULE.starts, SCHEDULE.ends))
    ]
    away = torch.stack(parts).cumsum(0) - latent.detach()  # of each scale's partial sum
    codes_loss = away.square().mean()

    found = quantize_for_training(quantizer, latent, SCHEDULE, commitment)
    torch.testing.assert_close(found.loss, (1 + commitment) * codes_loss)
    parameters = quantizer.embedding.weight, quantizer.quant_resi.qresi_ls[0].weight
    pulls = torch.autograd.grad(found.loss, (*parameters, latent), retain_graph=True)
    of_latent = -commitment * 2 * away.detach().mean(0) / latent.numel()
    torch.testing.assert_close(pulls, (*torch.autograd.grad(codes_loss, parameters, retain_graph=True), of_latent))

    torch.testing.assert_close(found.latent, sum(parts))
    (through,) = torch.autograd.grad(found.latent, latent, random_like(latent))
    torch.testing.assert_close(through, random_like(latent))


def test_adversarial_weight_is_the_ratio_of_the_gradients_of_the_last_layer() -> None:
    """VQGAN (Esser et al. 2021), equation 7, with the offset 1e-4 and the limit 1e4 of its public code."""
    last_weight = torch.zeros(2, requires_grad=True)

    def weight(reconstruction: list[float], adversarial: list[float]) -> float:
        losses = ((torch.tensor(gradient) * last_weight).sum() for gradient in (reconstruction, adversarial))
        found = adversarial_weight(*losses, last_weight, mean_over_ranks=lambda gradient: gradient)
        assert not found.requires_grad
        return found.item()

    assert weight([3.0, -4.0], [0.0, 2.0]) == pytest.approx(5 / (2 + 1e-4))
    assert weight([0.3, -0.4], [0.0, 1e-4]) == pytest.approx(0.5 / 2e-4)
    assert weight([3.0, -4.0], [0.0, 0.0]) == 1e4


def test_discriminator_loss_is_the_hinge() -> None:
    """Lim & Ye 2017: nothing is gained by judging a real patch above 1 or a decoded one below -1."""
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert discriminator_loss(real, fake).item() == pytest.approx(((0 + 0.5) / 2 + (0 + 1.25) / 2) / 2)


@pytest.fixture
def perceptual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PerceptualLoss:
    """The perceptual loss of a narrow VGG-16 with random weights."""
    models = pytest.importorskip("torchvision.models")

    def narrow_vgg16() -> torch.nn.Module:
        widths = [8, 8, "M", 8, 8, "M", 8, 8, 8, "M", 8, 8, 8]
        return torch.nn.Sequential(OrderedDict(features=models.vgg.make_layers(widths)))

    monkeypatch.setattr(models, "vgg16", narrow_vgg16)
    torch.manual_seed(0)
    torch.save(narrow_vgg16().state_dict(), tmp_path / "vgg16.pth")
    return PerceptualLoss(tmp_path / "vgg16.pth")


def test_perceptual_loss_is_zero_for_equal_pictures_and_pulls_towards_the_target(perceptual: PerceptualLoss) -> None:
    target = torch.rand(1, 3, 32, 32) * 2 - 1
    assert perceptual(target, target).item() == 0
    image = (target + 0.1 * torch.randn_like(target)).requires_grad_()
    distance = perceptual(image, target)
    (gradient,) = torch.autograd.grad(distance, image)
    assert perceptual(image - 0.01 * gradient / gradient.norm(), target) < distance


def test_perceptual_loss_keeps_nothing_of_the_target_for_its_gradient(perceptual: PerceptualLoss) -> None:
    """Through which nothing flows: half of VGG-16's activations, and of its backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    image = torch.rand(2, 3, 32, 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        distance = perceptual(image, torch.rand(2, 3, 32, 32))
    with_gradient = sum(kept.values())
    assert distance.requires_grad and with_gradient > 0
    # In float32, 2 pictures and 8 channels: 2 layers of 32 x 32 cells, of 16 x 16, 3 of 8 x 8, 3 of 4 x 4, each kept
    # before and after its ReLU at most, and thrice where its features are compared; all of it twice with the target.
    assert with_gradient < 4 * 2 * 8 * (5 * 32**2 + 5 * 16**2 + 7 * 8**2 + 7 * 4**2)


def test_perceptual_loss_compares_unit_features_of_imagenet_pictures_at_four_depths(
    perceptual: PerceptualLoss,
) -> None:
    """Johnson et al. 2016's layers, each cell's features of length 1 as in LPIPS (Zhang et al. 2018, equation 1)."""
    from torchvision.models import VGG16_Weights

    preset = VGG16_Weights.IMAGENET1K_V1.transforms()
    mean, std = (torch.tensor(values)[:, None, None] for values in (preset.mean, preset.std))

    def features(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """By the name of their layer: relu2_1 is the first after the first pooling."""
        x, found, block, number = ((pictures + 1) / 2 - mean) / std, {}, 1, 0
        for layer in perceptual.features:
            x = layer(x)
            if isinstance(layer, torch.nn.MaxPool2d):
                block, number = block + 1, 0
            elif isinstance(layer, torch.nn.ReLU):
                number += 1
                found[f"relu{block}_{number}"] = x / (x.norm(dim=1, keepdim=True) + 1e-10)
        return found

    image, target = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    of_image, of_target = features(image), features(target)
    distances = [
        (of_image[name] - of_target[name]).square().sum(1).mean()
        for name in ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    ]
    torch.testing.assert_close(perceptual(image, target), sum(distances) / 4)


def test_a_step_weighs_its_losses_and_clips_each_networks_gradient(
    make_config: MakeConfig, perceptual: PerceptualLoss, tmp_path: Path
) -> None:
    weights = {"l1": 2.0, "l2": 3.0, "perceptual": 5.0, "adversarial": 0.1}
    config = make_config(
        resolution=32,
        tokenizer={"scales": [1, 2, 4, 8]},
        loss={**weights, "vgg16_weights": str(tmp_path / "vgg16.pth")},
        gradient_clipping=1e-3,
        warmup_steps=0,
    )
    update = TokenizerUpdate(config, Ranks(1, torch.device("cpu")))
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made, quantization, *_ = update.autoencoder(pictures)
    real, fake = update.discriminator(pictures), update.discriminator(made)
    expected = {
        "quantization": quantization,
        "l1": (made - pictures).abs().mean(),
        "l2": (made - pictures).square().mean(),
        "perceptual": perceptual(made, pictures),
        "adversarial": -fake.mean(),
        "discriminator": (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2,
    }
    reconstruction = sum(weights[name] * expected[name] for name in ("l1", "l2", "perceptual"))
    wanted, judged = (
        torch.autograd.grad(loss, update.model.decoder.conv_out.weight, retain_graph=True)[0].norm()
        for loss in (reconstruction, expected["adversarial"])
    )
    adversarial = 0.1 * wanted / (judged + 1e-4) * expected["adversarial"]  # VQGAN, equation 7
    expected["total"] = reconstruction + adversarial + quantization

    values, _ = update(0, pictures, [])
    found = {key.removeprefix("loss/"): value.item() for key, value in values.items() if key.startswith("loss/")}
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)

    def stepped_norm(optimizers: list[torch.optim.Optimizer]) -> float:
        """Of the gradients of the first step, of which averages hold a tenth (Adam) or a twentieth (Muon)."""
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        gradients = [state["exp_avg"] / 0.1 if "exp_avg" in state else state["momentum"] / 0.05 for state in states]
        return torch.nn.utils.get_total_norm(gradients).item()

    assert values["optim/grad_norm"] > 1e-3
    assert stepped_norm([optimizer for optimizer, _ in update.optimizers]) == pytest.approx(1e-3, rel=1e-2)
    assert stepped_norm([update.discriminator_optimizer]) == pytest.approx(1e-3, rel=1e-2)
