"""The VQ-VAE against recorded runs of the public implementation, and the public checkpoint's names and shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from star_dist.errors import UserError
from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.config import VQVAEConfig
from star_dist.tokenizer.quantizer import SharedPhi
from star_dist.tokenizer.vqvae import MultiScaleVQVAE
from star_dist.weights import check_names_and_shapes

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Tensor]:
    with safe_open(golden_dir / "vqvae_a.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.fixture(scope="module")
def schedule() -> ScaleSchedule:
    return ScaleSchedule((1, 2, 3, 4))


@pytest.fixture(scope="module")
def model(golden: dict[str, Tensor], schedule: ScaleSchedule) -> MultiScaleVQVAE:
    model = MultiScaleVQVAE(VQVAEConfig(vocab_size=64, code_dim=8, channels=32, scales=schedule.sides))
    weights = {name.removeprefix("weights."): t.float() for name, t in golden.items() if name.startswith("weights.")}
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def test_latent(model: MultiScaleVQVAE, golden: dict[str, Tensor]) -> None:
    torch.testing.assert_close(model.encode_latent(golden["image"]), golden["latent"], atol=TOLERANCE, rtol=0)


def test_indices_are_exact(model: MultiScaleVQVAE, golden: dict[str, Tensor], schedule: ScaleSchedule) -> None:
    assert torch.equal(model.encode(golden["image"], schedule), golden["indices"].long())


def test_teacher_forcing_input(model: MultiScaleVQVAE, golden: dict[str, Tensor], schedule: ScaleSchedule) -> None:
    inputs = model.quantize.teacher_forcing_input(golden["indices"].long(), schedule)
    torch.testing.assert_close(inputs, golden["teacher_forcing_input"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("num_phi", "margin"), [(4, 1 / 3 / 4), *((n, 1 / 2 / n) for n in (1, 2, 3, 5, 8))])
def test_every_scale_takes_the_phi_that_the_public_code_takes(num_phi: int, margin: float) -> None:
    """The public code has its thirds for four of them alone. At 256 and 512 pixels two of ten scales lie halfway
    between two of them, up to rounding.
    """
    phis = SharedPhi(num_phi, 1)
    index = {phi: i for i, phi in enumerate(phis.qresi_ls)}

    def chosen(num_scales: int) -> list[int]:
        return [index[phis.at(scale, num_scales)] for scale in range(num_scales)]

    if num_phi == 4:
        assert chosen(10) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    ticks = np.linspace(margin, 1 - margin, num_phi)
    for num_scales in range(2, 40):
        public = [int(np.argmin(np.abs(ticks - scale / (num_scales - 1)))) for scale in range(num_scales)]
        assert chosen(num_scales) == public


def test_input_scale_by_scale_equals_the_teacher_forcing_input(
    model: MultiScaleVQVAE, golden: dict[str, Tensor], schedule: ScaleSchedule
) -> None:
    tokens_BL = golden["indices"].long()
    latent = model.quantize.empty_latent(len(tokens_BL), schedule)
    inputs = []
    for scale, (start, end) in enumerate(zip(schedule.starts, schedule.ends)):
        latent, next_input = model.quantize.next_input(latent, tokens_BL[:, start:end], scale, schedule)
        inputs.append(next_input)
    assert inputs.pop() is None
    torch.testing.assert_close(torch.cat(inputs, 1), golden["teacher_forcing_input"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(latent, model.quantize.decode(tokens_BL, schedule), atol=0, rtol=0)


def test_reconstruction(model: MultiScaleVQVAE, golden: dict[str, Tensor], schedule: ScaleSchedule) -> None:
    reconstruction = model.decode(golden["indices"].long(), schedule)
    torch.testing.assert_close(reconstruction, golden["reconstruction"], atol=TOLERANCE, rtol=0)


def test_each_row_is_coded_on_its_own(
    model: MultiScaleVQVAE, golden: dict[str, Tensor], schedule: ScaleSchedule
) -> None:
    rows = [model.encode(golden["image"][i : i + 1], schedule) for i in range(2)]
    assert torch.equal(torch.cat(rows), golden["indices"].long())


def test_a_latent_of_another_side_is_refused(model: MultiScaleVQVAE, schedule: ScaleSchedule) -> None:
    with pytest.raises(ValueError, match=r"\(5, 5\).*\[1, 2, 3, 4\]"):
        model.quantize.encode(torch.zeros(1, 8, 5, 5), schedule)


@pytest.fixture
def official_layout(golden_dir: Path) -> dict[str, Tensor]:
    shapes = json.loads((golden_dir / "vqvae_official_layout.json").read_text())
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.fixture
def public_state() -> dict[str, Tensor]:
    with torch.device("meta"):
        return MultiScaleVQVAE(VQVAEConfig()).state_dict()


def test_official_layout_is_accepted(official_layout: dict[str, Tensor], public_state: dict[str, Tensor]) -> None:
    check_names_and_shapes(official_layout, public_state, "vae_ch160v4096z32")


def test_other_layouts_are_refused_by_name(official_layout: dict[str, Tensor], public_state: dict[str, Tensor]) -> None:
    del official_layout["decoder.conv_out.bias"]
    official_layout["decoder.conv_out.gain"] = torch.empty(3, device="meta")
    official_layout["quant_conv.bias"] = torch.empty(31, device="meta")
    with pytest.raises(UserError) as error:
        check_names_and_shapes(official_layout, public_state, "vae_ch160v4096z32")
    assert "missing decoder.conv_out.bias" in str(error.value)
    assert "unknown decoder.conv_out.gain" in str(error.value)
    assert "quant_conv.bias has shape (31,), expected (32,)" in str(error.value)


def test_the_first_level_may_widen_the_first_convolution() -> None:
    config = VQVAEConfig(
        vocab_size=8,
        code_dim=4,
        channels=8,
        channel_multipliers=(2, 2),
        norm_groups=4,
        blocks_per_level=1,
        scales=(1, 2),
    )
    schedule = ScaleSchedule(config.scales)
    model = MultiScaleVQVAE(config)
    tokens = model.encode(torch.zeros(1, 3, 4, 4), schedule)
    assert model.decode(tokens, schedule).shape == (1, 3, 4, 4)


def test_tokens_and_inputs_are_of_float32_whatever_is_around(
    model: MultiScaleVQVAE, golden: dict[str, Tensor], schedule: ScaleSchedule
) -> None:
    tokens = golden["indices"].long()
    with torch.autocast("cpu", torch.bfloat16):
        found = model.quantize.encode(golden["latent"], schedule)
        inputs = model.quantize.teacher_forcing_input(tokens, schedule)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(inputs, golden["teacher_forcing_input"], atol=TOLERANCE, rtol=0)
