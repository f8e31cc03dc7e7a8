"""In-painting, out-painting and variations of photographs (matplotlib's sample picture)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image

from star_dist.data.pictures import crop_and_resize
from star_dist.errors import UserError
from star_dist.inference import editing
from star_dist.inference.editing import fill_unknown, inpaint, outpaint, vary
from star_dist.inference.options import SamplingOptions
from star_dist.inference.pipeline import StarPipeline
from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.config import VQVAEConfig
from star_dist.tokenizer.quantizer import MultiScaleQuantizer

SIDE = 16
OPTIONS = SamplingOptions(2.0, top_k=20)


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return crop_and_resize(Image.open(file), SIDE)


@pytest.fixture(scope="module")
def pipeline(inference_folder: Path) -> StarPipeline:
    return StarPipeline.from_pretrained(inference_folder)


def mask_of(left: int, top: int, right: int, bottom: int) -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


def encoded(pipeline: StarPipeline, picture: Image.Image) -> torch.Tensor:
    return pipeline.tokenizer.encode(editing._pixels(picture, SIDE, pipeline.device), pipeline.schedule)


@pytest.fixture
def drawn_tokens(pipeline: StarPipeline, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Tokens of every drawing that follows."""
    tokens = []
    sample = StarPipeline.sample

    def keep(self: StarPipeline, *arguments: object, **options: object) -> object:
        found = sample(self, *arguments, **options)
        tokens.append(found.tokens_BL)
        return found

    monkeypatch.setattr(StarPipeline, "sample", keep)
    return tokens


def test_nothing_to_redraw_gives_the_tokenizers_own_tokens(
    pipeline: StarPipeline, photograph: Image.Image, drawn_tokens: list
) -> None:
    result = inpaint(pipeline, ["red heart", "blue flag"], photograph, mask_of(0, 0, 0, 0), 1, OPTIONS)
    assert torch.equal(drawn_tokens[0], encoded(pipeline, photograph).expand(2, -1))
    assert [picture.tobytes() for picture in result] == [photograph.tobytes()] * 2


def test_everything_to_redraw_is_plain_sampling(
    pipeline: StarPipeline, photograph: Image.Image, drawn_tokens: list
) -> None:
    result = inpaint(pipeline, "red heart", photograph, mask_of(0, 0, SIDE, SIDE), 1, OPTIONS)
    assert result[0].tobytes() == pipeline("red heart", 1, OPTIONS)[0].tobytes()
    assert torch.equal(drawn_tokens[0], drawn_tokens[1])


def test_known_pixels_stay_and_the_text_decides_the_others(pipeline: StarPipeline, photograph: Image.Image) -> None:
    mask = mask_of(8, 0, SIDE, SIDE)
    pictures = inpaint(pipeline, ["red heart", "blue flag"], photograph, mask, [4, 4], OPTIONS)
    original = np.asarray(photograph)
    first, second = (np.asarray(picture) for picture in pictures)
    assert np.array_equal(first[:, :8], original[:, :8]) and np.array_equal(second[:, :8], original[:, :8])
    assert not np.array_equal(first[:, 8:], original[:, 8:]) and not np.array_equal(first[:, 8:], second[:, 8:])


@pytest.mark.parametrize("side", [SIDE, 50, 64, 8])
def test_what_is_hidden_does_not_leak(pipeline: StarPipeline, photograph: Image.Image, side: int) -> None:
    """The pixels under the mask decide nothing, of whatever size the picture is."""
    mask = mask_of(4, 4, 12, 12).resize((side, side), Image.Resampling.NEAREST)
    picture = photograph.resize((side, side), Image.Resampling.LANCZOS)
    other = picture.copy()
    other.paste((255, 0, 255), (0, 0), mask)
    assert picture.tobytes() != other.tobytes()
    results = [inpaint(pipeline, "red heart", known, mask, 1, OPTIONS)[0].tobytes() for known in (picture, other)]
    assert results[0] == results[1]


def test_a_pixel_is_redrawn_if_any_of_what_it_is_made_of_is(pipeline: StarPipeline, photograph: Image.Image) -> None:
    mask = Image.new("L", (64 * SIDE, 64 * SIDE))
    mask.putpixel((0, 0), 255)  # of 4,096 that become one
    drawn = inpaint(pipeline, ["red heart", "blue flag"], photograph.resize(mask.size), mask, [1, 2], OPTIONS)
    assert drawn[0].getpixel((0, 0)) != drawn[1].getpixel((0, 0))
    assert drawn[0].crop((1, 0, SIDE, SIDE)).tobytes() == drawn[1].crop((1, 0, SIDE, SIDE)).tobytes()


def test_forced_tokens_correct_what_coarse_scales_drew(pipeline: StarPipeline, photograph: Image.Image) -> None:
    """The latent of the known half is nearer to the photograph's than with the tokenizer's own tokens forced there."""
    target = editing._latent(pipeline, editing._pixels(photograph, SIDE, pipeline.device))
    known_BHH = torch.zeros(1, 1, 4, 4)
    known_BHH[..., :1] = 1  # less than half of a coarse cell, so that coarse scales are drawn
    own = encoded(pipeline, photograph)

    class OwnTokens(editing.KnownLatent):
        def at(self, latent_BCHH: torch.Tensor, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
            _, kept = super().at(latent_BCHH, scale)
            return own[:, self.schedule.starts[scale] : self.schedule.ends[scale]], kept

    errors = []
    for kind in (editing.KnownLatent, OwnTokens):
        known = kind(pipeline.tokenizer.quantize, pipeline.schedule, target, known_BHH)
        latent = pipeline.sample("red heart", 1, OPTIONS, known=known).latent_BCHH
        errors.append(((latent - target) * known_BHH).square().sum().item())
    assert errors[0] < errors[1]


def test_outpainting_keeps_the_picture_in_its_box(pipeline: StarPipeline, photograph: Image.Image) -> None:
    wide = photograph.resize((301, 200))  # its shape is the box's but for the rounding of edges
    assert outpaint(pipeline, "green face", wide, (0, 0.25, 0.75, 0.75), 1, OPTIONS)[0].size == (SIDE, SIDE)
    drawn = np.asarray(outpaint(pipeline, "green face", photograph, (0.25, 0.25, 0.75, 0.75), 1, OPTIONS)[0])
    small = np.asarray(photograph.resize((8, 8), Image.Resampling.LANCZOS))
    assert drawn.shape == (SIDE, SIDE, 3) and np.array_equal(drawn[4:12, 4:12], small)
    other = np.asarray(outpaint(pipeline, "green face", photograph, (0.25, 0.25, 0.75, 0.75), 2, OPTIONS)[0])
    assert not np.array_equal(drawn, other)


def test_variations_keep_the_first_scales(pipeline: StarPipeline, photograph: Image.Image, drawn_tokens: list) -> None:
    own = encoded(pipeline, photograph)
    for keep, end in enumerate((0, *pipeline.schedule.ends)):
        vary(pipeline, ["blue flag"] * 2, photograph, keep, 1, OPTIONS)
        assert torch.equal(drawn_tokens[-1][:, :end], own[:, :end].expand(2, -1))
        assert keep == 4 or not torch.equal(drawn_tokens[-1][0], drawn_tokens[-1][1])


def test_filling_continues_what_is_known() -> None:
    pixels = torch.linspace(-1, 1, 12).expand(1, 3, 12, 12).clone()
    known = torch.ones(1, 1, 12, 12)
    assert torch.equal(fill_unknown(pixels, known), pixels)
    known[..., 4:8, 4:8] = 0
    filled = fill_unknown(torch.where(known == 1, pixels, torch.tensor(99.0)), known)
    assert (filled - pixels).abs().max() < 0.35  # measured: 0.27; black would be 0.9 off
    assert not fill_unknown(pixels, torch.zeros(1, 1, 12, 12)).any()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p, photo: inpaint(p, "x", photo, Image.new("L", (8, 8))), "has 16 x 16 pixels, the mask 8 x 8"),
        (lambda p, photo: vary(p, "x", photo.resize((8, 9)), 1), "has 8 x 9 pixels, the model draws squares"),
        (lambda p, photo: vary(p, "x", photo, 5), r"keep_scales must lie in 0\.\.4, .* got 5"),
        (lambda p, photo: outpaint(p, "x", photo, (0, 0, 1.5, 1)), r"bottom in 0\.\.1 .* got \[0, 0, 1\.5, 1\]"),
        (lambda p, photo: outpaint(p, "x", photo, (0.5, 0, 0.5, 1)), "hold one of 16 pixels"),
        (lambda p, photo: outpaint(p, "x", photo, (float("nan"), 0, 1, 1)), "hold one of 16 pixels"),
        (lambda p, photo: outpaint(p, "x", photo.resize((48, 16)), (0, 0, 0.5, 0.5)), "48 x 16 pixels, its box 8 x 8"),
    ],
    ids=["mask", "oblong", "scales", "outside", "empty", "nan", "squashed"],
)  # fmt: skip
def test_mistakes(pipeline: StarPipeline, photograph: Image.Image, call: Callable, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(pipeline, photograph)


def test_a_cell_that_is_known_in_part_takes_the_code_of_that_part() -> None:
    quantizer = MultiScaleQuantizer(VQVAEConfig(vocab_size=2, code_dim=1, scales=(1, 2)))
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[1.0], [2.0]]))
    known_B1HH = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    known = editing.KnownLatent(quantizer, ScaleSchedule((1, 2)), torch.full((1, 1, 2, 2), 2.0), known_B1HH)
    tokens, kept = known.at(torch.zeros(1, 1, 2, 2), 0)
    assert tokens.tolist() == [[1]] and kept.tolist() == [[True]]  # half of 2 would be code 0
    assert known.at(torch.zeros(1, 1, 2, 2), 1)[1].tolist() == [[True, False, True, False]]


def test_smoothing_mixes_what_is_drawn_and_not_what_is_kept(pipeline: StarPipeline, photograph: Image.Image) -> None:
    target = editing._latent(pipeline, editing._pixels(photograph, SIDE, pipeline.device))
    known_B1HH = torch.zeros(1, 1, 4, 4)
    for share in (1.0, 0.5):
        known_B1HH[..., : int(4 * share)] = 1
        known = editing.KnownLatent(pipeline.tokenizer.quantize, pipeline.schedule, target, known_B1HH)
        drawn = pipeline.sample("red heart", 1, SamplingOptions(top_k=8, smoothing=1.0), known=known)
        of_tokens = pipeline.tokenizer.quantize.decode(drawn.tokens_BL, pipeline.schedule)
        assert torch.allclose(drawn.latent_BCHH, of_tokens, atol=1e-5) == (share == 1.0)
        known_B1HH.zero_()


def test_the_box_is_left_top_right_bottom(pipeline: StarPipeline, photograph: Image.Image) -> None:
    wide = photograph.resize((8, 4))
    drawn = np.asarray(outpaint(pipeline, "green face", wide, (0, 0.25, 0.5, 0.5), 1, OPTIONS)[0])
    assert np.array_equal(drawn[4:8, 0:8], np.asarray(wide))


def test_outpainting_encodes_no_edge(pipeline: StarPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, latent = [], editing._latent
    monkeypatch.setattr(editing, "_latent", lambda pipeline, pixels: seen.append(pixels) or latent(pipeline, pixels))
    outpaint(pipeline, "green face", Image.new("RGB", (8, 8), "white"), (0.25, 0.25, 0.75, 0.75), 1, OPTIONS)
    assert (seen[0] == 1).all()  # white goes on, where the canvas is black
