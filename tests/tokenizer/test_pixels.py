"""How far pixels decoded in half precision are from those in float32, and that pieces make the same pictures."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from star_dist.scales import ScaleSchedule
from star_dist.tokenizer import pixels
from star_dist.tokenizer.config import VQVAEConfig
from star_dist.tokenizer.io import load_tokenizer
from star_dist.tokenizer.pixels import PixelDecoder, SpreadGroupNorm
from star_dist.tokenizer.vqvae import MultiScaleVQVAE

LEVELS = 127.5  # of 8-bit pixels per unit
SCHEDULE = ScaleSchedule((1, 2, 3, 4))


def test_bf16_pixels_are_close(golden_dir: Path) -> None:
    """On the recorded tokenizer, with channels last as on a GPU."""
    model = MultiScaleVQVAE(VQVAEConfig(vocab_size=64, code_dim=8, channels=32, scales=SCHEDULE.sides))
    with safe_open(golden_dir / "vqvae_a.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("weights.")]
        model.load_state_dict({name.removeprefix("weights."): file.get_tensor(name).float() for name in names})
        tokens_BL = file.get_tensor("indices").long()
    latent = model.quantize.decode(tokens_BL, SCHEDULE).detach()
    exact, half = model.decode_quantized(latent), PixelDecoder(model, torch.bfloat16)(latent)
    assert half.dtype == torch.float32
    away = (half - exact).abs() * LEVELS
    assert away.mean() < 2 and away.max() < 12  # measured: 0.99 and 7.7 levels of 255


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 8e-3)])
def test_norms_that_spread_over_a_gpu_are_group_norm(dtype: torch.dtype, tolerance: float) -> None:
    """In bf16 within its rounding, also where the mean is many times the spread."""
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.GroupNorm(4, 12, eps=1e-6)
    x = (20 + torch.randn(2, 12, 16, 16, generator=generator)).to(dtype)
    x[1, :3] = 0  # one group without any spread
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(12, generator=generator).to(dtype))
        exact = norm(x.float())
        found = SpreadGroupNorm(norm.to(dtype))(x.to(memory_format=torch.channels_last))
    assert torch.allclose(found.float(), exact, rtol=tolerance, atol=tolerance)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)


def test_on_a_cpu_pixels_are_the_tokenizers_own(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokens_BL = torch.randint(64, (5, SCHEDULE.num_tokens), generator=torch.Generator().manual_seed(0))
    latent = tokenizer.quantize.decode(tokens_BL, SCHEDULE).detach()
    assert torch.equal(PixelDecoder(tokenizer)(latent), tokenizer.decode(tokens_BL, SCHEDULE))
    half = PixelDecoder(tokenizer, torch.bfloat16)
    together = half(latent)
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}
    monkeypatch.setattr(pixels, "PIXELS_AT_ONCE", 2 * 16**2)  # two pictures at a time
    sizes = []
    decode = MultiScaleVQVAE.decode_latent

    def counted(self: MultiScaleVQVAE, chunk: torch.Tensor) -> torch.Tensor:
        sizes.append(len(chunk))
        return decode(self, chunk)

    monkeypatch.setattr(MultiScaleVQVAE, "decode_latent", counted)
    assert (half(latent) - together).abs().max() < 0.02
    assert sizes == [2, 2, 1]
