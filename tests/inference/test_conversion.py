"""Public checkpoints in and out: exact both ways, on the recorded ones and on the published shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from star_dist.config import RunConfig, TextSection
from star_dist.conversion import from_public, to_public
from star_dist.errors import UserError
from star_dist.export import (
    ExportConfig,
    initial_weights_from,
    load_export_tokenizer,
    load_model,
    read_export_config,
    write_inference_folder,
)
from star_dist.inference.pipeline import StarPipeline
from star_dist.model.config import StarConfig
from star_dist.model_card import ModelFacts
from star_dist.public_layout import (
    PublicCheckpointOptions,
    check_weights,
    infer_star_config,
    infer_tokenizer_config,
    public_weights,
)
from star_dist.scales import PUBLIC_SCALES
from star_dist.weights import read_weights
from tests.ranks import run_script

ROOT = Path(__file__).parents[2]
SCALES = (1, 2, 3, 4)
FACTS = ModelFacts(
    source="training run runs/demo",
    licence="cc-by-sa-4.0",
    dataset="openmoji",
    samples={"train": 60},
    attribution="pictures by OpenMoji",
    training={"train.steps": 40, "optimizer.betas": [0.9, 0.95]},
    metrics={"loss": 2.5},
    versions={"torch": "2.11.0", "git": None},
)
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
    return from_public(*public, out, PublicCheckpointOptions(scales=scales, text=text))


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


def without_source(config: ExportConfig) -> dict[str, object]:
    return config.model_dump(exclude={"facts": {"source"}})


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
    config = infer_star_config(weights, PublicCheckpointOptions(scales=PUBLIC_SCALES[256]), "file")
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
        assert infer_tokenizer_config(weights, PublicCheckpointOptions(scales=scales), "file") == VQVAEConfig()


def test_ours_to_public_and_back(tmp_path: Path, inference_folder: Path) -> None:
    """A model trained here has no class embedding: the public layout gets zeros for it."""
    record = to_public(inference_folder, tmp_path / "public", "pth")
    assert record["public_code_must_change"] == {"rope_convention": "paper", "norm_groups": 4}
    files = tmp_path / "public" / "star.pth", tmp_path / "public" / "vae.pth"
    assert not read_weights(files[0])["class_emb.weight"].any()
    from_public(*files, tmp_path / "again", PublicCheckpointOptions())
    original, before = load_model(inference_folder)
    config, after = load_model(tmp_path / "again")
    assert same(dict(before.named_parameters()), dict(after.named_parameters()))
    assert without_source(config) == without_source(original)  # also the name of the copied text encoder
    assert config.facts.source.startswith("converted from star.pth (sha256 ")
    drawn = [
        StarPipeline.from_pretrained(folder, "cpu")("red heart", 5)[0].tobytes()
        for folder in (inference_folder, tmp_path / "again")
    ]  # by the copied text encoder
    assert drawn[0] == drawn[1]
    with pytest.raises(UserError, match="exists and is not empty; choose another --out"):
        to_public(inference_folder, tmp_path / "public", "pth")


def other_folder(inference_folder: Path, out: Path, scales: tuple[int, ...], **rope: float) -> ExportConfig:
    """The inference folder with other scales and rotations, and with a text encoder that is named and not copied."""
    config, model = load_model(inference_folder)
    weights = dict(model.named_parameters())
    nearest = [level * len(SCALES) // len(scales) for level in range(len(scales))]
    weights["lvl_embed.weight"] = weights["lvl_embed.weight"][nearest]
    other = config.model_copy(
        update={
            "model": dataclasses.replace(config.model, scales=scales, **rope),
            "text": TextSection(encoder="someone/else", width=16, max_tokens=9, pooling="mean"),
            "resolution": 4 * scales[-1],
            "run_name": "hearts",
            "step": 40,
            "facts": FACTS,
        }
    )
    write_inference_folder(out, weights, other, load_export_tokenizer(inference_folder, config))
    return other


@pytest.mark.parametrize(
    ("scales", "rope", "changes"),
    [
        (SCALES, {"rope_theta": 100.0, "rope_extent": 32.0}, {"rope_theta": 100.0, "rope_extent": 32.0}),
        ((1, 2, 3, 4, 6, 8), {}, {"tokenizer_scales": [1, 2, 3, 4]}),
    ],
    ids=["rope", "scales"],
)
def test_what_the_files_do_not_tell_comes_back(
    tmp_path: Path, inference_folder: Path, scales: tuple[int, ...], rope: dict[str, float], changes: dict[str, object]
) -> None:
    """Bit for bit, from the record alone."""
    before = other_folder(inference_folder, tmp_path / "model", scales, **rope)
    record = to_public(tmp_path / "model", tmp_path / "public", "safetensors")
    assert record["public_code_must_change"] == {"rope_convention": "paper", "norm_groups": 4} | changes
    files = tmp_path / "public" / "star.safetensors", tmp_path / "public" / "vae.safetensors"
    from_public(*files, tmp_path / "again", PublicCheckpointOptions())
    after = read_export_config(tmp_path / "again")
    assert without_source(after) == without_source(before)
    assert after.facts.source.startswith("training run runs/demo; converted from star.safetensors (sha256 ")
    for file in ("model.safetensors", "tokenizer/model.safetensors"):
        assert same(load_file(tmp_path / "again" / file), load_file(tmp_path / "model" / file))
    tokenizers = [(tmp_path / folder / "tokenizer" / "config.json").read_text() for folder in ("again", "model")]
    assert tokenizers[0] == tokenizers[1]
    to_public(tmp_path / "again", tmp_path / "public again", "safetensors")
    for file in files:
        assert same(load_file(tmp_path / "public again" / file.name), load_file(file))


def test_a_licence_that_is_given_wins(tmp_path: Path, inference_folder: Path) -> None:
    before = other_folder(inference_folder, tmp_path / "model", SCALES)
    to_public(tmp_path / "model", tmp_path / "public", "pth")
    files = tmp_path / "public" / "star.pth", tmp_path / "public" / "vae.pth"
    from_public(*files, tmp_path / "again", PublicCheckpointOptions(), "mit")
    facts = read_export_config(tmp_path / "again").facts
    assert facts.licence == "mit" and "license: mit" in (tmp_path / "again" / "README.md").read_text()
    assert facts.attribution == before.facts.attribution


def test_records_without_facts_are_read(tmp_path: Path, inference_folder: Path) -> None:
    """Older ones have the folder of the text encoder's copy in place of its name."""
    to_public(inference_folder, tmp_path / "public", "pth")
    record = tmp_path / "public" / "conversion.json"
    values = json.loads(record.read_text())
    del values["text_encoder_copied"]
    values["text"]["encoder"] = "./text_encoder"
    values["source"] = {"run_name": "hearts", "step": 40}
    record.write_text(json.dumps(values))
    from_public(
        tmp_path / "public" / "star.pth", tmp_path / "public" / "vae.pth", tmp_path / "again", PublicCheckpointOptions()
    )
    after = read_export_config(tmp_path / "again")
    assert (after.run_name, after.step, after.text.encoder) == ("hearts", 40, "text_encoder")
    before = read_export_config(inference_folder)
    assert after.model == before.model and after.facts.licence is None
    drawn = [
        StarPipeline.from_pretrained(folder, "cpu")("red heart", 5) for folder in (inference_folder, tmp_path / "again")
    ]
    assert drawn[0][0].tobytes() == drawn[1][0].tobytes()


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_conversion_that_fails_is_not_in_the_way(
    tmp_path: Path, inference_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(shutil, "copyfile", full)
        to_public(inference_folder, tmp_path / "public", kind)
    assert not (tmp_path / "public").exists()
    to_public(inference_folder, tmp_path / "public", kind)
    copied = [tmp_path / "public" / "text_encoder", inference_folder / "text_encoder"]
    left, right = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in copied)
    assert left == right


def test_options_and_the_record_must_agree(tmp_path: Path, inference_folder: Path, text: TextSection) -> None:
    other_folder(inference_folder, tmp_path / "model", SCALES, rope_theta=100.0)
    to_public(tmp_path / "model", tmp_path / "public", "pth")
    files = tmp_path / "public" / "star.pth", tmp_path / "public" / "vae.pth"
    agreeing = PublicCheckpointOptions(scales=SCALES, rope_theta=100.0, text=TextSection(max_tokens=9))
    assert from_public(*files, tmp_path / "again", agreeing).text.encoder == "someone/else"
    for given, said in [
        (PublicCheckpointOptions(rope_theta=10000.0), r"rope_theta is 100\.0, the options say 10000\.0"),
        (PublicCheckpointOptions(scales=(1, 2, 3, 5)), r"scales is \(1, 2, 3, 4\), the options say \(1, 2, 3, 5\)"),
        (PublicCheckpointOptions(text=TextSection(pooling="pooler")), r"text\.pooling is mean, the options say pooler"),
    ]:
        with pytest.raises(UserError, match=rf"conversion\.json says that {said}; leave it out") as error:
            from_public(*files, tmp_path / "refused", given)
        assert "\n" not in str(error.value)
    record = tmp_path / "public" / "conversion.json"
    values = json.loads(record.read_text())
    for change, said in [
        ({"tokenizer_hash": "another"}, r"is of a model with tokenizer another, .*vae\.pth has \w{16}"),
        ({"scales": [2, 1]}, r"conversion\.json: scales must start with 1"),
        ({"rope_theta": "high"}, r"conversion\.json: rope_theta: .* got \"high\""),
        (
            {"text": {"encoder": "./text_encoder"}},
            r"text encoder lies beside it, but .* is no folder; .* text\.encoder",
        ),
        ({"text_encoder_copied": True}, r"lies beside it, but .* is no folder; .* change text_encoder_copied in"),
        ({"source": {"run_name": "hearts"}}, r"conversion\.json: source\.step is missing"),
        ({"source": {"run_name": "a", "step": 1, "facts": {"licence": 3}}}, r"source\.facts\.licence: .* got 3"),
    ]:
        record.write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=said) as error:
            from_public(*files, tmp_path / "refused", PublicCheckpointOptions())
        assert "\n" not in str(error.value)
    assert not (tmp_path / "refused").exists()


def test_without_a_record_nothing_is_guessed(tmp_path: Path, inference_folder: Path) -> None:
    scales, rope = (1, 2, 3, 4, 6, 8), {"rope_theta": 100.0, "rope_extent": 32.0}
    before = other_folder(inference_folder, tmp_path / "model", scales, **rope)
    to_public(tmp_path / "model", tmp_path / "public", "pth")
    (tmp_path / "public" / "conversion.json").unlink()
    files = tmp_path / "public" / "star.pth", tmp_path / "public" / "vae.pth"
    with pytest.raises(UserError, match="both have ten scales: give --resolution or --scales"):
        from_public(*files, tmp_path / "again", PublicCheckpointOptions())
    given = {"scales": scales, "rope_convention": "paper", "norm_groups": 4, "text": before.text} | rope
    said = (
        r"has statistics of 4 scales, not of the 6 .*; give the 4 sides that it was trained with as --tokenizer-scales"
    )
    with pytest.raises(UserError, match=said) as error:
        from_public(*files, tmp_path / "again", PublicCheckpointOptions(**given))
    assert "\n" not in str(error.value) and not (tmp_path / "again").exists()
    after = from_public(*files, tmp_path / "again", PublicCheckpointOptions(tokenizer_scales=SCALES, **given))
    assert after.model == before.model and after.tokenizer_hash == before.tokenizer_hash


def test_options_of_the_command(tmp_path: Path, inference_folder: Path) -> None:
    other_folder(inference_folder, tmp_path / "model", SCALES, rope_theta=100.0, rope_extent=32.0)
    to_public(tmp_path / "model", tmp_path / "public", "pth")
    (tmp_path / "public" / "conversion.json").rename(tmp_path / "record")
    command = ["from-public", "--out", str(tmp_path / "again")]
    command += ["--transformer", str(tmp_path / "public" / "star.pth")]
    command += ["--tokenizer", str(tmp_path / "public" / "vae.pth")]
    options = ["--scales", "1,2,3,4", "--tokenizer-scales", "1,2,3,4", "--rope-convention", "paper"]
    options += ["--rope-theta", "100", "--rope-extent", "32", "--norm-groups", "4"]
    options += ["--text-encoder", "someone/else", "--text-max-tokens", "9", "--text-pooling", "mean"]
    result = run_script(ROOT / "launcher/convert.py", *command, *options)
    assert result.returncode == 0 and "theta 100, extent 32" in result.stdout, result.stderr
    before, after = (read_export_config(tmp_path / folder) for folder in ("model", "again"))
    assert (after.model, after.text) == (before.model, before.text)
    (tmp_path / "record").rename(tmp_path / "public" / "conversion.json")
    result = run_script(ROOT / "launcher/convert.py", *command, *options)
    assert result.returncode == 0, result.stderr
    result = run_script(ROOT / "launcher/convert.py", *command, "--rope-extent", "64")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "rope_extent is 32.0, the options say 64.0" in errors[0]


def test_a_pipeline_saves_what_only_the_public_layout_has(tmp_path: Path, inference_folder: Path) -> None:
    to_public(inference_folder, tmp_path / "public", "pth")
    files = tmp_path / "public" / "star.pth", tmp_path / "public" / "vae.pth"
    weights = read_weights(files[0])
    weights["class_emb.weight"] = torch.randn(weights["class_emb.weight"].shape)
    torch.save(weights, files[0])
    from_public(*files, tmp_path / "model", PublicCheckpointOptions())
    StarPipeline.from_pretrained(tmp_path / "model", "cpu").save_pretrained(tmp_path / "saved")
    to_public(tmp_path / "saved", tmp_path / "back", "pth")
    assert same(read_weights(tmp_path / "back" / "star.pth"), weights)
    assert same(read_weights(tmp_path / "back" / "vae.pth"), read_weights(files[1]))


def test_training_goes_on_from_a_converted_model(
    tmp_path: Path, inference_folder: Path, run_config: Callable[..., RunConfig]
) -> None:
    to_public(inference_folder, tmp_path / "public", "safetensors")
    files = tmp_path / "public" / "star.safetensors", tmp_path / "public" / "vae.safetensors"
    config = from_public(*files, tmp_path / "again", PublicCheckpointOptions())
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


def test_legacy_files_that_are_damaged_are_refused_in_one_line(tmp_path: Path) -> None:
    """Of PyTorch's first format, whose reader checks nothing: a cut or another byte anywhere."""
    path = tmp_path / "star.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i])
        with pytest.raises(UserError, match="is no file of tensors, or a damaged one"):
            read_weights(path)
        path.write_bytes(whole[:i] + b"\x85" + whole[i + 1 :])
        with contextlib.suppress(UserError):  # a tensor's value may be any
            read_weights(path)


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
    with pytest.raises(UserError, match=r"has 4 levels, there are 5 scales: \[1, 2, 3, 4, 5\]; give 4 sides"):
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
