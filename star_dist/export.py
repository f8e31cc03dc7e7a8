"""The inference folder: what a training run leaves behind for others.

DIR/config.json           ExportConfig
DIR/model.safetensors     the transformer, bf16 or fp32, under the public parameter names
DIR/tokenizer/            the VQ-VAE
DIR/text_encoder/         a copy of the text encoder, where the run's was a local folder (else config.json names it)
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from star_dist.config import RunConfig, Section, TextSection
from star_dist.errors import UserError
from star_dist.model.config import StarConfig
from star_dist.model.star import STAR
from star_dist.text import save_text_encoder
from star_dist.tokenizer.io import load_tokenizer, save_tokenizer, tokenizer_hash
from star_dist.tokenizer.vqvae import MultiScaleVQVAE
from star_dist.weights import check_names_and_shapes, read_weights

logger = logging.getLogger(__name__)

FORMAT = "star-dist inference folder 1"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FOLDER = "tokenizer"
TEXT_ENCODER_FOLDER = "text_encoder"

# Part of the public checkpoints and of no computation: a class embedding that STAR never uses.
IGNORED_PUBLIC_NAMES = ("class_emb.weight",)
# Zero buffers of the public checkpoints that stand for the absent key bias.
ZERO_BUFFER_SUFFIX = "zero_k_bias"


class ExportConfig(Section):
    """What the weights mean and where they come from."""

    format: Literal["star-dist inference folder 1"] = FORMAT
    model: StarConfig
    text: TextSection
    tokenizer_hash: str
    resolution: int
    dtype: Literal["bf16", "fp32"]
    run_name: str
    step: int


def check_weights(weights: dict[str, Tensor], model: STAR, source: str) -> dict[str, Tensor]:
    """Accepts our own and the public layout: drops what carries no information, refuses what does not fit.

    Returns the weights under the model's names; a warning names what was ignored.

    Raises:
        UserError: missing or unknown names or wrong shapes, all of them named.
    """
    weights = dict(weights)
    for name in list(weights):
        if name in IGNORED_PUBLIC_NAMES:
            logger.warning("%s: ignored %s, which STAR never uses", source, name)
            del weights[name]
        elif name.endswith(ZERO_BUFFER_SUFFIX):
            if weights[name].any():
                raise UserError(f"{source}: {name} must be zero (keys have no bias), but it is not")
            del weights[name]
    check_names_and_shapes(weights, dict(model.named_parameters()), source)
    return weights


def check_replaceable(folder: Path) -> None:
    """Makes sure that an export deletes nothing but an earlier export.

    Raises:
        UserError: the folder exists, is not empty and is no inference folder.
    """
    if not folder.name:
        raise UserError(f"--out {str(folder)!r} has no name of its own; give the folder to write")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            read_export_config(folder)
        except UserError:
            raise UserError(f"{folder} exists and is no inference folder; choose another --out") from None
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")


def write_inference_folder(
    folder: Path, weights: dict[str, Tensor], config: RunConfig, step: int, dtype: Literal["bf16", "fp32"]
) -> None:
    """Writes the folder beside its final place, reloads and compares it, and then moves it there.

    weights: fp32, by name, from `Engine.full_weights`.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stored = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in weights.items()}
    save_file(stored, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    tokenizer = load_tokenizer(Path(config.tokenizer.path))
    save_tokenizer(tokenizer, partial / TOKENIZER_FOLDER)
    text = save_text_encoder(config.text, partial / TEXT_ENCODER_FOLDER)
    export = ExportConfig(
        model=config.star_config(),
        text=text,
        tokenizer_hash=tokenizer_hash(tokenizer),
        resolution=config.resolution,
        dtype=dtype,
        run_name=config.name,
        step=step,
    )
    (partial / CONFIG_FILE).write_text(export.model_dump_json(indent=2) + "\n")

    _, model = load_model(partial)
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter.detach(), stored[name]):
            raise RuntimeError(f"{partial}: {name} changed while it was written; the disk may be failing")
    load_export_tokenizer(partial, export)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def read_export_config(folder: Path) -> ExportConfig:
    """Reads and validates `config.json` of an inference folder.

    Raises:
        UserError: no inference folder there, or a damaged one.
    """
    path = folder / CONFIG_FILE
    try:
        return ExportConfig.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no inference folder: it has no {CONFIG_FILE} (launcher/export.py writes one)"
        ) from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{path} is damaged: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def load_model(folder: Path, dtype: torch.dtype | None = None, attention: str = "auto") -> tuple[ExportConfig, STAR]:
    """The transformer of an inference folder, in eval mode on the CPU; `dtype` null keeps the stored one.

    Raises:
        UserError: no such folder, or weights that are damaged or do not fit.
    """
    config = read_export_config(folder)
    with torch.device("meta"):
        model = STAR(config.model, attention)
    weights = check_weights(read_weights(folder / WEIGHTS_FILE), model, str(folder / WEIGHTS_FILE))
    model.load_state_dict({name: tensor.to(dtype or tensor.dtype) for name, tensor in weights.items()}, assign=True)
    return config, model.eval().requires_grad_(False)


def load_export_tokenizer(folder: Path, config: ExportConfig) -> MultiScaleVQVAE:
    """The VQ-VAE of an inference folder, checked against the hash that the transformer was trained with."""
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    found = tokenizer_hash(tokenizer)
    if found != config.tokenizer_hash:
        raise UserError(
            f"{folder}: the tokenizer has hash {found}, the transformer was trained with {config.tokenizer_hash}"
        )
    return tokenizer


def initial_weights_from(folder: Path, config: RunConfig) -> dict[str, Tensor]:
    """Weights of an exported model to start a run with (`train.init_from`), also for another schedule of scales.

    Level embeddings are taken from the exported level at the nearest relative position k / (K - 1): the same level
    where both schedules have equally many scales. Everything else is taken as it is.

    Raises:
        UserError: the exported model has other sizes than the run.
    """
    exported, source = load_model(folder, dtype=torch.float32)
    weights = {name: parameter.detach() for name, parameter in source.named_parameters()}
    levels = len(config.scales)
    old_levels = len(exported.model.scales)
    nearest = [round(level / max(levels - 1, 1) * (old_levels - 1)) for level in range(levels)]
    weights["lvl_embed.weight"] = weights["lvl_embed.weight"][nearest]
    with torch.device("meta"):
        model = STAR(config.star_config(), config.model.attention)
    if exported.model.positions == "rope" and exported.model.rope_convention != config.model.rope_convention:
        raise UserError(
            f"{folder} was trained with model.rope_convention {exported.model.rope_convention}, the run has "
            f"{config.model.rope_convention}; change it"
        )
    return check_weights(weights, model, str(folder))
