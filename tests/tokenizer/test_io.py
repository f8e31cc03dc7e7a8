"""Tokenizers on disk: what is written is read back, and damaged or foreign files are refused in one message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from star_dist.errors import UserError
from star_dist.tokenizer import io
from star_dist.tokenizer.config import VQVAEConfig
from star_dist.tokenizer.io import load_tokenizer, save_tokenizer, tokenizer_hash
from star_dist.tokenizer.vqvae import MultiScaleVQVAE


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A tokenizer folder that a test may damage."""
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    model = load_tokenizer(folder)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    save_tokenizer(model, tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert tokenizer_hash(again) == tokenizer_hash(model)
    assert [path.name for path in sorted((tmp_path / "again").iterdir())] == ["config.json", "model.safetensors"]


def test_memory_format_does_not_change_the_file(folder: Path, tmp_path: Path) -> None:
    model = load_tokenizer(folder)
    identity = tokenizer_hash(model)
    model.to(memory_format=torch.channels_last)
    assert tokenizer_hash(model) == identity
    save_tokenizer(model, tmp_path / "again")
    assert (tmp_path / "again" / io.WEIGHTS_FILE).read_bytes() == (folder / io.WEIGHTS_FILE).read_bytes()


def test_hash_is_of_what_decides_tokens_and_pictures(folder: Path) -> None:
    model = load_tokenizer(folder)
    identity = tokenizer_hash(model)
    assert len(identity) == 16
    model.quantize.ema_vocab_hit_SV += 1
    assert tokenizer_hash(model) == identity
    model.decoder.conv_out.bias[0] += 1e-3
    assert tokenizer_hash(model) != identity


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_public_checkpoint_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """A bare file has the public sizes; here small ones stand for them."""
    model = load_tokenizer(folder)
    monkeypatch.setattr(io, "VQVAEConfig", lambda: model.config)
    path = tmp_path / f"vae{suffix}"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    assert tokenizer_hash(load_tokenizer(path)) == tokenizer_hash(model)


def test_foreign_weights_are_refused_naming_the_tensors(folder: Path, tmp_path: Path) -> None:
    state = load_tokenizer(folder).state_dict()
    path = tmp_path / "vae.pth"
    torch.save(state, path)
    with pytest.raises(UserError, match=r"vae\.pth does not fit: missing encoder.*and \d+ more"):
        load_tokenizer(path)  # a small tokenizer is not the public one
    del state["quant_conv.bias"]
    state["extra"] = torch.zeros(1)
    save_file(state, folder / io.WEIGHTS_FILE)
    with pytest.raises(UserError, match=r"missing quant_conv\.bias; unknown extra"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["vae.pth", "vae.safetensors"])
@pytest.mark.parametrize("content", ["truncated", "text", "empty"])
def test_damaged_files_are_refused(folder: Path, tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    state = load_tokenizer(folder).state_dict()
    torch.save(state, path) if name.endswith(".pth") else save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"no tensors here\n" * 9, "empty": b""}[content])
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)


def test_pickled_objects_are_not_run(tmp_path: Path) -> None:
    path = tmp_path / "vae.pth"
    torch.save({"model": VQVAEConfig()}, path)
    with pytest.raises(UserError, match=r"vae\.pth"):
        load_tokenizer(path)


def test_other_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no tokenizer folder: it has no config\.json"):
        load_tokenizer(tmp_path)
    config = json.loads((folder / io.CONFIG_FILE).read_text())
    for changes, message in (({"format": "other"}, "is not a"), ({"chanels": 8}, "chanels"), ({"norm_groups": 3}, "3")):
        (folder / io.CONFIG_FILE).write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            load_tokenizer(folder)
    (folder / io.CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(folder)


def test_weights_that_do_not_fit_the_config_are_refused(folder: Path) -> None:
    config = json.loads((folder / io.CONFIG_FILE).read_text())
    (folder / io.CONFIG_FILE).write_text(json.dumps(config | {"vocab_size": 65}))
    with pytest.raises(UserError, match=r"quantize\.embedding\.weight has shape \(64, 8\), expected \(65, 8\)"):
        load_tokenizer(folder)


def test_models_of_both_sizes_build_without_memory() -> None:
    with torch.device("meta"):
        model = MultiScaleVQVAE(VQVAEConfig())
    assert next(model.parameters()).is_meta
