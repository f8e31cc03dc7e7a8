"""Public checkpoints in and out: exact both ways, on the recorded ones and on the published shapes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from star_dist.config import RunConfig, TextSection
from star_dist.conversion import from_public, to_public
from star_dist.errors import UserError
from star_dist.export import ExportConfig, initial_weights_from, load_model, read_export_config
from star_dist.inference.pipeline import StarPipeline
from star_dist.model.config import StarConfig
from star_dist.public_layout import (
    check_weights,
    infer_star_config,
    infer_tokenizer_config,
    public_weights,
)
from star_dist.scales import PUBLIC_SCALES
from star_dist.weights import read_weights

SCALES = (1, 2, 3, 4)
Weights = dict[str, torch.Tensor]


def golden_weights(path: Path) -> Weights:
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith("weights.")]
        return {name.removeprefix("weights."): file.get_tensor(name) for name in names}


@pytest.fixture
def text(text_encoder_folder: Path) -> TextSection:
    return TextSection(encoder=str(text_encoder_folder), encoder_subfolder="", tokenizer_subfolder="", max_tokens=8)


@pytest.fixture
def public(golden_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The recorded public checkpoints as files; the class embedding is not zero, as in a trained one."""
    transformer = golden_weights(golden_dir / "star_a.safetensors")
    torch.manual_seed(0)
    transformer["class_emb.weight"] = torch.randn(transformer["class_emb.weight"].shape).bfloat16()
    torch.save(transformer, tmp_path / "star_a.pth")
    tokenizer = {name: t.float() for name, t in golden_weights(golden_dir / "vqvae_a.safetensors").items()}
    torch.save(tokenizer, tmp_path / "vqvae_a.pth")
    return tmp_path / "star_a.pth", tmp_path / "vqvae_a.pth"


def convert(public: tuple[Path, Path], out: Path, text: TextSection, scales: tuple[int, ...] = SCALES) -> ExportConfig:
    return from_public(*public, out, scales, "public", text, None)


def same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_round_trip_of_the_goldens(public: tuple[Path, Path], tmp_path: Path, text: TextSection, kind: str) -> None:
    config = convert(public, tmp_path / "model", text)
    assert (config.model.width, config.model.heads, config.model.depth, config.resolution) == (128, 2, 2, 64)
    assert config.dtype == "bf16" and config.model.rope_convention == "public"
    assert "sha256" in (tmp_path / "model" / "README.md").read_text()
    record = to_public(tmp_path / "model", tmp_path / "back", kind)
    assert record["rope_convention"] == "public" and record["public_code_must_change"] == {}
    assert record["scales"] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "back" / "conversion.json").read_text()) == record
    assert same(read_weights(tmp_path / "back" / f"star.{kind}"), read_weights(public[0]))
    assert same(read_weights(tmp_path / "back" / f"vae.{kind}"), read_weights(public[1]))


def random_weights(layout: dict[str, list[int]]) -> Weights:
    torch.manual_seed(1)
    return {
        name: torch.zeros(shape) if name.endswith("zero_k_bias") else torch.randn(shape)
        for name, shape in layout.items()
    }


def test_round_trip_of_the_published_d16(golden_dir: Path) -> None:
    """All 274M numbers of it, in memory."""
    layout = json.loads((golden_dir / "star_official_layout.json").read_text())["16"]
    weights = random_weights(layout)
    config = infer_star_config(weights, PUBLIC_SCALES[256], "public", "file")
    assert config == StarConfig(depth=16, scales=PUBLIC_SCALES[256], rope_convention="public")
    from star_dist.model.star import STAR

    with torch.device("meta"):
        ours = check_weights(weights, STAR(config), "file")
    assert same(public_weights(ours, config, weights["class_emb.weight"]), weights)
    zeros = public_weights(ours, config)
    assert {name: list(tensor.shape) for name, tensor in zeros.items()} == layout


def test_sizes_of_the_published_tokenizer_are_found(golden_dir: Path) -> None:
    from star_dist.tokenizer.config import VQVAEConfig

    layout = json.loads((golden_dir / "vqvae_official_layout.json").read_text())
    weights = {name: torch.empty(shape, device="meta") for name, shape in layout.items()}
    for scales in PUBLIC_SCALES.values():
        assert infer_tokenizer_config(weights, scales, 32, "file") == VQVAEConfig()


def test_ours_to_public_and_back(tmp_path: Path, inference_folder: Path, text: TextSection) -> None:
    """A model trained here has no class embedding: the public layout gets zeros for it."""
    record = to_public(inference_folder, tmp_path / "public", "pth")
    assert record["public_code_must_change"] == {"rope_convention": "paper", "norm_groups": 4}
    files = tmp_path / "public" / "star.pth", tmp_path / "public" / "vae.pth"
    assert not read_weights(files[0])["class_emb.weight"].any()
    from_public(*files, tmp_path / "again", SCALES, "paper", text, "mit", 4)
    _, before = load_model(inference_folder)
    config, after = load_model(tmp_path / "again")
    assert same(dict(before.named_parameters()), dict(after.named_parameters()))
    assert config.tokenizer_hash == read_export_config(inference_folder).tokenizer_hash
    assert config.facts.licence == "mit" and "license: mit" in (tmp_path / "again" / "README.md").read_text()
    with pytest.raises(UserError, match="exists and is not empty; choose another --out"):
        to_public(inference_folder, tmp_path / "public", "pth")


def test_a_pipeline_saves_what_only_the_public_layout_has(
    tmp_path: Path, inference_folder: Path, text: TextSection
) -> None:
    to_public(inference_folder, tmp_path / "public", "pth")
    files = tmp_path / "public" / "star.pth", tmp_path / "public" / "vae.pth"
    weights = read_weights(files[0])
    weights["class_emb.weight"] = torch.randn(weights["class_emb.weight"].shape)
    torch.save(weights, files[0])
    from_public(*files, tmp_path / "model", SCALES, "paper", text, None, 4)
    StarPipeline.from_pretrained(tmp_path / "model", "cpu").save_pretrained(tmp_path / "saved")
    to_public(tmp_path / "saved", tmp_path / "back", "pth")
    assert same(read_weights(tmp_path / "back" / "star.pth"), weights)
    assert same(read_weights(tmp_path / "back" / "vae.pth"), read_weights(files[1]))


def test_training_goes_on_from_a_converted_model(
    tmp_path: Path, inference_folder: Path, text: TextSection, run_config: Callable[..., RunConfig]
) -> None:
    to_public(inference_folder, tmp_path / "public", "safetensors")
    files = tmp_path / "public" / "star.safetensors", tmp_path / "public" / "vae.safetensors"
    config = from_public(*files, tmp_path / "again", SCALES, "paper", text, None, 4)
    wider = run_config(scales=[1, 2, 3, 4, 6, 8], resolution=32)
    found = initial_weights_from(tmp_path / "again", wider, config.tokenizer_hash)
    assert same(found, initial_weights_from(inference_folder, wider, config.tokenizer_hash))
    assert len(found["lvl_embed.weight"]) == 6


def test_what_the_public_code_cannot_express_is_refused() -> None:
    weights = {"word_embed.weight": torch.zeros(32, 8)}
    sizes = dict(depth=1, width=32, heads=1, scales=SCALES)
    with pytest.raises(UserError, match="no model with positions learned; it needs positions rope"):
        public_weights(weights, StarConfig(positions="learned", **sizes))
    with pytest.raises(UserError, match="no model with cross_attention False"):
        public_weights(weights, StarConfig(cross_attention=False, **sizes))


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut", "is no file of tensors, or a damaged one"),
        ("empty", "is no file of tensors, or a damaged one"),
        ("shape", r"word_embed\.bias has shape \(3,\), expected \(128,\)"),
        ("dimensions", r"word_embed\.weight has shape \(3,\), expected 2 dimensions"),
        ("missing", "missing blocks.1.ffn.fc2.bias"),
        ("other", "is no STAR transformer of the public layout: it has no word_embed.weight"),
        ("bias", "zero_k_bias must be zero"),
        ("nested", "does not hold a dictionary of tensors"),
        ("pickle", "is no file of tensors, or a damaged one"),
        ("absent", "does not exist"),
        ("float64", "holds torch.float64"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_one_line(
    public: tuple[Path, Path], tmp_path: Path, text: TextSection, damage: str, said: str
) -> None:
    path = public[0]
    weights = read_weights(path)
    if damage in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 5000 * (damage == "cut")])
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"word_embed.weight": Payload(tmp_path / "ran")}))
    elif damage == "absent":
        path.unlink()
    else:
        changes = {
            "shape": {"word_embed.bias": torch.zeros(3)},
            "dimensions": {"word_embed.weight": torch.zeros(3)},
            "bias": {"blocks.0.attn.zero_k_bias": torch.ones(128)},
            "nested": {"trainer": {"weights": torch.zeros(1)}},
            "float64": {"pos_start": torch.zeros(1, 1, 128, dtype=torch.float64)},
        }
        weights |= changes.get(damage, {})
        if damage == "missing":
            del weights["blocks.1.ffn.fc2.bias"]
        torch.save({"x": torch.zeros(1)} if damage == "other" else weights, path)
    with pytest.raises(UserError, match=said) as error:
        convert(public, tmp_path / "model", text)
    assert "\n" not in str(error.value) and "star_a.pth" in str(error.value)
    assert not (tmp_path / "model").exists() and not (tmp_path / "ran").exists()


def test_scales_and_tokenizers_of_another_model_are_refused(
    public: tuple[Path, Path], tmp_path: Path, text: TextSection
) -> None:
    with pytest.raises(UserError, match=r"has 4 levels, --scales has 5: \[1, 2, 3, 4, 5\]; give 4 sides"):
        convert(public, tmp_path / "model", text, (1, 2, 3, 4, 5))
    tokenizer = read_weights(public[1])
    tokenizer["quantize.embedding.weight"] = torch.zeros(65, 8)
    torch.save(tokenizer, public[1])
    with pytest.raises(UserError, match=r"has vocab_size 64, .*vqvae_a\.pth has 65; they are not of one model"):
        convert(public, tmp_path / "model", text)


def test_sharded_weights(
    inference_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: TextSection
) -> None:
    """Beyond the limit (5 GB, here 40 kB) weights lie in several files with an index; foreign ones are refused."""
    from star_dist import weights
    from star_dist.inference.pipeline import StarPipeline

    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", "40KB")
    pipeline = StarPipeline.from_pretrained(inference_folder)
    folder = tmp_path / "sharded"
    pipeline.save_pretrained(folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (folder / "model.safetensors").exists()
    again = StarPipeline.from_pretrained(folder)
    assert same(dict(again.model.named_parameters()), dict(pipeline.model.named_parameters()))
    assert again("red heart", 5)[0].tobytes() == pipeline("red heart", 5)[0].tobytes()
    stored = load_file(shards[0])
    stored.pop(next(iter(stored)))
    save_file(stored, shards[0])
    with pytest.raises(UserError, match=r"model-00001-of-.* does not hold what model\.safetensors\.index\.json says"):
        StarPipeline.from_pretrained(folder)
    shards[0].unlink()
    with pytest.raises(UserError, match="does not exist"):
        StarPipeline.from_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"pos_start": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="is damaged"):
        StarPipeline.from_pretrained(folder)
