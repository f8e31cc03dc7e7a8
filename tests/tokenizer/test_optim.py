"""The tokenizer's optimizers: what each trains, what decays, and Muon's update against its published formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from star_dist.tokenizer.muon import Muon, orthogonalize
from star_dist.tokenizer.optim import build_optimizers, initialize
from star_dist.tokenizer.ranks import Ranks
from star_dist.tokenizer.update import TokenizerUpdate
from star_dist.tokenizer.vqvae import MultiScaleVQVAE, ResidualBlock
from tests.tokenizer.conftest import MakeConfig


def test_every_trained_parameter_is_in_exactly_one_optimizer(make_config: MakeConfig) -> None:
    for changes in ({}, {"muon_learning_rate": None}, {"resolution": 8, "tokenizer": {"scales": [1, 2]}}):
        config = make_config(**changes)
        model = MultiScaleVQVAE(config.tokenizer)
        initialize(model, config)
        ids = [
            id(parameter)
            for optimizer, _ in build_optimizers(model, config)
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert (
        all(name.startswith("quantize.quant_resi") for name in frozen) and len(frozen) == 4
    )  # two scales use two phis


def test_blocks_start_as_the_identity_up_to_a_bias_and_codes_at_the_size_of_latents(make_config: MakeConfig) -> None:
    config = make_config()
    torch.manual_seed(0)
    model = MultiScaleVQVAE(config.tokenizer)
    initialize(model, config)
    for block in model.modules():
        if isinstance(block, ResidualBlock):
            x = torch.randn(2, block.conv1.in_channels, 4, 4)
            added = block(x) - block.nin_shortcut(x)
            torch.testing.assert_close(added, added[:1, :, :1, :1].expand_as(added))
    latents = model.encode_latent(torch.rand(4, 3, 16, 16) * 2 - 1)
    assert 0.2 < latents.std() / model.quantize.embedding.weight.std() < 5


@pytest.mark.parametrize("shape", [(2, 8, 24), (3, 24, 8), (1, 8, 8)])
def test_orthogonalize_sets_singular_values_to_about_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("muon_rate", [0.02, None], ids=["muon", "adamw alone"])
def test_convolutions_decay_and_codes_norms_and_biases_do_not(make_config: MakeConfig, muon_rate: float | None) -> None:
    """Where no gradient moves them; each at the rate of its optimizer, which is AdamW's in the first and last layer."""
    config = make_config(muon_learning_rate=muon_rate, learning_rate=0.01, weight_decay=0.5)
    model = MultiScaleVQVAE(config.tokenizer)
    initialize(model, config)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    for optimizer, _ in build_optimizers(model, config):
        optimizer.step()
    decays = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name, parameter in model.named_parameters():
        outer = name in ("encoder.conv_in.weight", "decoder.conv_out.weight")
        rate = config.learning_rate if outer or muon_rate is None else muon_rate
        kept = 1 - rate * config.weight_decay if name in decays and parameter.requires_grad else 1
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, kept), msg=name)


@pytest.mark.parametrize("shape", [(12, 3, 1, 1), (3, 12, 1, 1), (4, 2, 3, 3)], ids=str)
def test_muon_moves_a_matrix_by_its_orthogonalized_nesterov_momentum(shape: tuple[int, ...]) -> None:
    """As https://kellerjordan.github.io/posts/muon has it, with the quintic on singular values in place of products."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    rate, decay, rows = 0.1, 0.2, shape[0]
    optimizer = Muon([weight], rate, decay)
    expected, momentum = weight.detach().flatten(1), 0
    for _ in range(2):
        weight.grad = torch.randn(shape, generator=generator)
        gradient = weight.grad.flatten(1)
        momentum = 0.95 * momentum + 0.05 * gradient
        left, values, right = torch.linalg.svd(0.95 * momentum + 0.05 * gradient, full_matrices=False)
        values = values / values.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        step = rate * max(1, rows / gradient.shape[1]) ** 0.5
        expected = (1 - rate * decay) * expected - step * left @ values.diag() @ right
        optimizer.step()
        torch.testing.assert_close(weight.detach().flatten(1), expected, rtol=1e-4, atol=1e-4)


def test_rates_follow_the_schedule_and_the_discriminator_joins_at_its_step(make_config: MakeConfig) -> None:
    loss = {"adversarial": 0.1, "adversarial_start": 1}
    config = make_config(resolution=32, tokenizer={"scales": [1, 2, 4, 8]}, loss=loss, warmup_steps=4)
    update = TokenizerUpdate(config, Ranks(1, torch.device("cpu")))
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (adamw, _), (muon, _) = update.optimizers
    for step in range(2):
        judgement = [parameter.detach().clone() for parameter in update.discriminator.parameters()]
        values, _ = update(step, pictures, [])
        fraction = (step + 1) / 4
        assert {group["lr"] for group in adamw.param_groups} == {values["optim/learning_rate"]}
        assert values["optim/learning_rate"] == pytest.approx(fraction * config.learning_rate)
        assert muon.param_groups[0]["lr"] == pytest.approx(fraction * config.muon_learning_rate)
        stays = all(map(torch.equal, judgement, update.discriminator.parameters()))
        assert stays == ("loss/adversarial" not in values) == (step == 0)
    assert update.discriminator_optimizer.param_groups[0]["lr"] == pytest.approx(fraction * config.learning_rate)
