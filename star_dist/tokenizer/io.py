"""Tokenizers on disk: our folder (config.json, model.safetensors) and the public checkpoint file.

Nothing is unpickled but tensors: `.pth` files are read with weights_only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from star_dist.errors import UserError
from star_dist.files import read_json_object, sync_to_disk, write_text_atomically
from star_dist.tokenizer.config import VQVAEConfig
from star_dist.tokenizer.vqvae import MultiScaleVQVAE
from star_dist.weights import check_names_and_shapes, read_weights

FORMAT = "star-dist tokenizer 1"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
QUANTIZATION = 2  # raised when the same weights come to mean other tokens, so that older data sets are refused
STATISTICS = "quantize.ema_vocab_hit_SV"  # counts of training; decide neither tokens nor pictures


def save_tokenizer(model: MultiScaleVQVAE, folder: Path) -> None:
    """Writes `model.safetensors` (float32), then `config.json`: a folder is a tokenizer once it has both.

    All of it is on the disk when this returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    sync_to_disk(folder / WEIGHTS_FILE)
    config = {"format": FORMAT, **dataclasses.asdict(model.config)}
    write_text_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    for path in (folder / CONFIG_FILE, folder):
        sync_to_disk(path)


def load_tokenizer(path: Path) -> MultiScaleVQVAE:
    """A frozen tokenizer in eval mode on the CPU, from our folder or from the public checkpoint (.pth, .safetensors).

    Raises:
        UserError: no such file, a damaged one, or names or shapes that do not fit the architecture.
    """
    if path.is_dir():
        config = _read_config(path / CONFIG_FILE)
        weights = read_weights(path / WEIGHTS_FILE)
    elif path.is_file():
        config, weights = VQVAEConfig(), read_weights(path)
    else:
        raise UserError(
            f"no tokenizer at {path}; tokenizer.path takes a tokenizer folder or the public checkpoint file"
        )
    return build_tokenizer(config, weights, str(path))


def build_tokenizer(config: VQVAEConfig, weights: Mapping[str, Tensor], source: str) -> MultiScaleVQVAE:
    """A frozen tokenizer in eval mode on the CPU with the given weights, in float32.

    Raises:
        UserError: names or shapes that do not fit the architecture; `source` names them.
    """
    # Not on the meta device: drawing initial weights there imports torch's compiler, which takes seconds.
    with torch.random.fork_rng(devices=[]):
        model = MultiScaleVQVAE(config)
    check_names_and_shapes(weights, model.state_dict(), source)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model.eval().requires_grad_(False)


def tokenizer_hash(model: MultiScaleVQVAE) -> str:
    """Identity of what decides tokens and pictures: weights and architecture, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    architecture = dataclasses.asdict(model.config)
    del architecture["scales"]  # the schedule is a choice of each data set and recorded there
    digest.update(json.dumps({"quantization": QUANTIZATION, **architecture}, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name != STATISTICS:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_config(path: Path) -> VQVAEConfig:
    values = read_json_object(path, f"{path.parent} is no tokenizer folder: it has no {CONFIG_FILE}")
    if values.pop("format", None) != FORMAT:
        raise UserError(
            f"{path} is not a {FORMAT!r} config; tokenizer.path takes what launcher/train_tokenizer.py wrote"
        )
    try:
        return VQVAEConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
