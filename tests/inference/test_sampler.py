"""Sampling against the recorded greedy run of the public implementation, and what must hold for every draw."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from star_dist.errors import UserError
from star_dist.inference.options import SamplingOptions, ScaleOptions
from star_dist.inference.sampler import SampledScale, draw, sample_pictures
from star_dist.model.config import StarConfig
from star_dist.model.initialization import initialize_weights
from star_dist.model.layout import PackedLayout
from star_dist.model.star import STAR, pack_inputs
from star_dist.scales import ScaleSchedule
from star_dist.text import TextFeatures
from star_dist.tokenizer.config import VQVAEConfig
from star_dist.tokenizer.vqvae import MultiScaleVQVAE
from tests.model.test_star import golden_model

SCHEDULE = ScaleSchedule((1, 2, 3, 4))
GREEDY = SamplingOptions(guidance=0.0, top_k=1)


@pytest.fixture(scope="module")
def golden_tokenizer(golden_dir: Path) -> MultiScaleVQVAE:
    config = VQVAEConfig(vocab_size=64, code_dim=8, channels=32, scales=SCHEDULE.sides)
    model = MultiScaleVQVAE(config)
    with safe_open(golden_dir / "vqvae_a.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("weights.")]
        model.load_state_dict({name.removeprefix("weights."): file.get_tensor(name).float() for name in names})
    return model.eval().requires_grad_(False)


def golden_text(golden: dict[str, torch.Tensor], rows: list[int]) -> TextFeatures:
    lengths = [int(golden["text_mask"][row].sum()) for row in rows]
    pairs = [(golden["text_hidden"][row, :n], golden["text_pooled"][row]) for row, n in zip(rows, lengths)]
    return TextFeatures.pack(pairs)


def test_greedy_tokens_and_picture_of_the_public_implementation(
    golden: dict, golden_tokenizer: MultiScaleVQVAE
) -> None:
    model = golden_model(golden)
    for rows in ([0, 1, 2], [0], [1], [2], [2, 0, 1, 2, 1, 0, 0]):
        text = golden_text(golden, rows)
        tokens = sample_pictures(
            model, golden_tokenizer.quantize, text, text, SCHEDULE, GREEDY, [0] * len(rows)
        ).tokens_BL
        assert torch.equal(tokens.int(), golden["greedy_tokens"][rows])
        image = golden_tokenizer.decode(tokens, SCHEDULE) * 0.5 + 0.5
        assert (image - golden["greedy_image"][rows]).abs().max() < 1e-4


@pytest.fixture(scope="module")
def tiny() -> tuple[STAR, MultiScaleVQVAE, TextFeatures, TextFeatures]:
    config = StarConfig(depth=2, width=32, heads=2, scales=SCHEDULE.sides, vocab_size=64, code_dim=8, text_width=16)
    model = STAR(config)
    initialize_weights(model, seed=1)
    with torch.no_grad():
        model.head_logits.weight.mul_(300)
    torch.manual_seed(0)
    vqvae = MultiScaleVQVAE(
        VQVAEConfig(
            vocab_size=64, code_dim=8, channels=8, channel_multipliers=(1, 2), norm_groups=4, blocks_per_level=1
        )
    )
    text = TextFeatures.pack([(torch.randn(n, 16), torch.randn(16)) for n in (3, 5, 2)])
    empty = TextFeatures.pack([(torch.randn(2, 16), torch.randn(16))])
    return model.eval().requires_grad_(False), vqvae.requires_grad_(False), text, empty


def one(text: TextFeatures, row: int) -> TextFeatures:
    return TextFeatures.pack([text[row]])


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(top_k=10), SamplingOptions(0.0, 0, 0.7)])
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(tiny: tuple, options: SamplingOptions) -> None:
    model, vqvae, text, empty = tiny
    together = sample_pictures(model, vqvae.quantize, text, empty, SCHEDULE, options, [5, 6, 7]).tokens_BL
    for row in range(3):
        alone = sample_pictures(model, vqvae.quantize, one(text, row), empty, SCHEDULE, options, [5 + row]).tokens_BL
        assert torch.equal(alone[0], together[row])
    other = sample_pictures(model, vqvae.quantize, text, empty, SCHEDULE, options, [8, 9, 10]).tokens_BL
    assert not torch.equal(other, together)


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("cross_attention", [True, False])
def test_the_cache_changes_nothing(tiny: tuple, positions: str, cross_attention: bool) -> None:
    """Greedy sampling with the cache picks what teacher forcing on the same tokens would pick."""
    _, vqvae, text, empty = tiny
    config = StarConfig(
        depth=2, width=32, heads=2, scales=SCHEDULE.sides, vocab_size=64, code_dim=8, text_width=16,
        positions=positions, cross_attention=cross_attention,
    )  # fmt: skip
    model = STAR(config)
    initialize_weights(model, seed=2)
    tokens = sample_pictures(model, vqvae.quantize, text, empty, SCHEDULE, GREEDY, [0, 0, 0]).tokens_BL
    inputs = pack_inputs(vqvae.quantize.teacher_forcing_input(tokens, SCHEDULE))
    layout = PackedLayout.uniform(SCHEDULE, 3, text.lengths)
    logits = model(inputs, text.hidden_SW, text.pooled_BW, layout=layout)
    assert torch.equal(logits.argmax(-1).view(3, -1), tokens)


def test_guidance_follows_the_published_rule(tiny: tuple) -> None:
    """logits = (1 + t) cond - t uncond with t = guidance * k / (K - 1), checked by hand over the scales."""
    model, vqvae, text, empty = tiny
    guided = sample_pictures(
        model, vqvae.quantize, one(text, 0), empty, SCHEDULE, SamplingOptions(guidance=3.0, top_k=1), [0]
    ).tokens_BL
    inputs = pack_inputs(vqvae.quantize.teacher_forcing_input(guided, SCHEDULE))
    logits = [
        model(inputs, t.hidden_SW, t.pooled_BW, layout=PackedLayout.uniform(SCHEDULE, 1, t.lengths))
        for t in (one(text, 0), empty)
    ]
    for scale, (start, end) in enumerate(zip(SCHEDULE.starts, SCHEDULE.ends)):
        strength = 3.0 * scale / 3
        expected = ((1 + strength) * logits[0] - strength * logits[1])[start:end].argmax(-1)
        assert torch.equal(guided[0, start:end], expected)


def test_top_k_and_top_p_keep_what_they_say() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 4000, 4)
    generator = [torch.Generator().manual_seed(0)]

    def drawn(**options: float) -> torch.Tensor:
        return draw(logits, ScaleOptions(**options), generator)[0]

    assert set(drawn(top_k=2).unique().tolist()) == {0, 1}
    assert set(drawn(top_p=0.79).unique().tolist()) == {0, 1}
    assert set(drawn(top_p=0.81).unique().tolist()) == {0, 1, 2}
    assert set(drawn(top_p=1e-6).unique().tolist()) == {0}
    shares = drawn()[0].bincount(minlength=4) / 4000
    assert (shares - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 0.03
    cold = drawn(temperature=0.05)
    assert (cold == 0).float().mean() > 0.99


@pytest.mark.parametrize("values", [(-1.0,), (0.0, -1), (0.0, 0, 1.5), (0.0, 0, 0.0, 0.0)])
def test_options_out_of_range_are_refused(values: tuple) -> None:
    with pytest.raises(ValueError, match="must"):
        SamplingOptions(*values)


def test_nothing_is_divided_by_less_than_float32_bears(tiny: tuple) -> None:
    model, vqvae, text, empty = tiny
    for options in (SamplingOptions(temperature=1e-6), SamplingOptions(smoothing=1e-6), SamplingOptions(smoothing=0)):
        drawn = sample_pictures(model, vqvae.quantize, text, empty, SCHEDULE, options, [1, 2, 3])
        assert drawn.latent_BCHH.isfinite().all()
    with pytest.raises(UserError, match=r"temperature must be 1e-06 or more \(top_k 1 is greedy\), got 1e-38"):
        SamplingOptions(temperature=(1.0, 1e-38))
    with pytest.raises(UserError, match=r"smoothing must be 0 \(off\) or 1e-06 or more, got 1e-38"):
        SamplingOptions(smoothing=1e-38)


def test_options_by_scale() -> None:
    options = SamplingOptions(3.0, top_k=(1, 1, 5, 0), temperature=0.5).by_scale(4)
    assert [chosen.top_k for chosen in options] == [1, 1, 5, 0]
    assert [chosen.temperature for chosen in options] == [0.5] * 4
    assert [chosen.guidance for chosen in options] == [0, 1, 2, 3]
    assert [chosen.guidance for chosen in SamplingOptions(guidance_by_scale=(2, 0, 1, 0)).by_scale(4)] == [2, 0, 1, 0]
    with pytest.raises(UserError, match=r"top_k has 3 values, the model has 4 scales; give one value or 4"):
        SamplingOptions(top_k=(1, 2, 3)).by_scale(4)
    with pytest.raises(UserError, match=r"guidance_by_scale has 1 values, the model has 4 scales; give 4"):
        SamplingOptions(guidance_by_scale=(1.0,)).by_scale(4)
    for wrong in (dict(top_k=(1, -1)), dict(smoothing=float("nan")), dict(guidance_by_scale=(0.0, -2.0))):
        with pytest.raises(UserError, match="must"):
            SamplingOptions(**wrong)


def test_options_hold_at_their_scale_alone(tiny: tuple) -> None:
    """Greedy at the first two scales makes these the same for every seed, and the later ones differ."""
    model, vqvae, text, empty = tiny
    options = SamplingOptions(guidance=0.0, top_k=(1, 1, 0, 0))
    first, second = (
        sample_pictures(model, vqvae.quantize, text, empty, SCHEDULE, options, seeds).tokens_BL
        for seeds in ([1, 2, 3], [4, 5, 6])
    )
    assert torch.equal(first[:, :5], second[:, :5]) and not torch.equal(first[:, 5:14], second[:, 5:14])


def test_scales_without_guidance_run_half_the_rows_exactly(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unconditional half ends after the last guided scale, and tokens are what both halves would have given."""
    model, vqvae, text, empty = tiny
    rows = []
    run_blocks = STAR.run_blocks

    def counted(self: STAR, *arguments: object) -> torch.Tensor:
        rows.append(getattr(arguments[-1], "rows", None))
        return run_blocks(self, *arguments)

    monkeypatch.setattr(STAR, "run_blocks", counted)
    for strengths, expected in [((0, 2, 0, 0), [6, 6, 3, 3]), ((0, 0, 0, 2), [6, 6, 6, 6]), ((0, 0, 0, 0), [3] * 4)]:
        rows.clear()
        options = SamplingOptions(guidance_by_scale=strengths, top_k=1)
        drawn = sample_pictures(model, vqvae.quantize, text, empty, SCHEDULE, options, [0] * 3).tokens_BL
        assert rows == expected
        inputs = pack_inputs(vqvae.quantize.teacher_forcing_input(drawn[:1], SCHEDULE))
        logits = [
            model(inputs, t.hidden_SW, t.pooled_BW, layout=PackedLayout.uniform(SCHEDULE, 1, t.lengths))
            for t in (one(text, 0), empty)
        ]
        for strength, start, end in zip(strengths, SCHEDULE.starts, SCHEDULE.ends):
            guided = (1 + strength) * logits[0][start:end] - strength * logits[1][start:end]
            assert torch.equal(drawn[0, start:end], guided.argmax(-1))


def test_callback_sees_every_scale_and_its_running_sum(tiny: tuple) -> None:
    model, vqvae, text, empty = tiny
    seen: list[SampledScale] = []
    drawn = sample_pictures(
        model, vqvae.quantize, text, empty, SCHEDULE, SamplingOptions(), [1, 2, 3], on_scale=seen.append
    )
    assert [(scale.scale, scale.num_scales) for scale in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert torch.equal(torch.cat([scale.tokens_BN for scale in seen], dim=1), drawn.tokens_BL)
    assert torch.equal(seen[-1].latent_BCHH, drawn.latent_BCHH)
    assert torch.equal(vqvae.quantize.decode(drawn.tokens_BL, SCHEDULE), drawn.latent_BCHH)


def test_smoothing_mixes_kept_codes_and_vanishes_with_its_width(tiny: tuple) -> None:
    model, vqvae, text, empty = tiny

    def latent(smoothing: float, top_k: int = 8) -> torch.Tensor:
        options = SamplingOptions(top_k=top_k, smoothing=smoothing)
        return sample_pictures(model, vqvae.quantize, text, empty, SCHEDULE, options, [1, 2, 3]).latent_BCHH

    plain = latent(0.0)
    assert (latent(1e-4) - plain).abs().max() < 1e-3 * plain.abs().max()
    assert (latent(1.0) - plain).abs().max() > 0.1 * plain.abs().max()
    assert torch.equal(latent(1.0, top_k=1), latent(0.0, top_k=1))


def test_bf16_draws_most_of_the_same_tokens(golden: dict, golden_tokenizer: MultiScaleVQVAE) -> None:
    """Given the golden's own tokens of the smaller scales, so that one difference does not become many."""
    model = golden_model(golden).bfloat16()
    text = golden_text(golden, [0, 1, 2])
    inputs = pack_inputs(golden_tokenizer.quantize.teacher_forcing_input(golden["greedy_tokens"].long(), SCHEDULE))
    layout = PackedLayout.uniform(SCHEDULE, 3, text.lengths)
    logits = model(inputs, text.hidden_SW, text.pooled_BW, layout=layout)
    agreement = (logits.argmax(-1).view(3, -1) == golden["greedy_tokens"]).float().mean().item()
    assert agreement > 0.9  # measured: 0.978, 88 of 90
    drawn = sample_pictures(model, golden_tokenizer.quantize, text, text, SCHEDULE, GREEDY, [0] * 3).tokens_BL
    assert (drawn == golden["greedy_tokens"]).float().mean() > 0.8  # measured: 0.933
    again = sample_pictures(model, golden_tokenizer.quantize, text, text, SCHEDULE, GREEDY, [0] * 3).tokens_BL
    assert torch.equal(drawn, again)


def test_the_latent_is_added_up_in_float32_whatever_is_around(tiny: tuple) -> None:
    model, vqvae, text, empty = tiny
    with torch.autocast("cpu", torch.bfloat16):
        drawn = sample_pictures(model, vqvae.quantize, text, empty, SCHEDULE, SamplingOptions(), [1, 2, 3])
    assert torch.equal(vqvae.quantize.decode(drawn.tokens_BL, SCHEDULE), drawn.latent_BCHH)


def test_top_p_is_of_the_tempered_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 4000, 4)
    options = ScaleOptions(temperature=0.5, top_p=0.9)  # squared and normalised: 0.68, 0.25, 0.06, 0.01
    tokens, _ = draw(logits, options, [torch.Generator().manual_seed(0)])
    assert set(tokens.unique().tolist()) == {0, 1}
