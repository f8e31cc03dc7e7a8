"""The inference folder: what a training run leaves behind for others, laid out as on the Hugging Face hub.

DIR/README.md             model card: the run's facts for people
DIR/config.json           ExportConfig
DIR/model.safetensors     the transformer, bf16 or fp32, under the public parameter names; beyond 5 GB
                          model-00001-of-0000N.safetensors and model.safetensors.index.json
DIR/tokenizer/            the VQ-VAE
DIR/text_encoder/         a copy of the text encoder, where the run's was a local folder (else config.json names it)
DIR/public_layout.safetensors    what only the public layout has, where the weights were converted from it
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError, field_validator
from safetensors.torch import save_file
from torch import Tensor

from star_dist.config import RunConfig, Section, TextSection
from star_dist.errors import UserError, first_line
from star_dist.files import read_json_object
from star_dist.hub import hub_error
from star_dist.model.config import StarConfig
from star_dist.model.star import STAR
from star_dist.model_card import ModelFacts, model_card
from star_dist.public_layout import check_weights
from star_dist.scales import ScaleSchedule
from star_dist.text import portable_name, save_text_encoder
from star_dist.tokenizer.io import load_tokenizer, save_tokenizer, tokenizer_hash
from star_dist.tokenizer.vqvae import MultiScaleVQVAE
from star_dist.weights import WRITTEN_FILES, read_weights, read_weights_folder, write_weights

FORMAT = "star-dist inference folder 1"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
TOKENIZER_FOLDER = "tokenizer"
TEXT_ENCODER_FOLDER = "text_encoder"
PUBLIC_EXTRAS_FILE = "public_layout.safetensors"
OWN_NAMES = frozenset({CONFIG_FILE, CARD_FILE, TOKENIZER_FOLDER, TEXT_ENCODER_FOLDER, PUBLIC_EXTRAS_FILE})

# What is fetched of a hub repository: nothing that would have to be unpickled.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.md", "*.model")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ExportConfig(Section):
    """What the weights mean and where they come from. run_name, step: the training run, 0 where that is not known.

    Raises:
        ValueError: the model's scales do not start with 1 or do not grow.
    """

    format: Literal["star-dist inference folder 1"] = FORMAT
    model: StarConfig
    text: TextSection
    tokenizer_hash: str
    resolution: int
    dtype: Literal["bf16", "fp32"]
    run_name: str
    step: int
    facts: ModelFacts = ModelFacts()

    @field_validator("model")
    @classmethod
    def _scales_are_a_schedule(cls, model: StarConfig) -> StarConfig:
        ScaleSchedule(model.scales)
        return model


def check_replaceable(folder: Path) -> None:
    """Makes sure that an export deletes nothing but an earlier export.

    Raises:
        UserError: the folder exists and holds something else.
    """
    if not folder.name:
        raise UserError(f"--out {str(folder)!r} has no name of its own; give the folder to write")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            read_export_config(folder)
        except UserError:
            raise UserError(f"{folder} exists and is no inference folder; choose another --out") from None
        names = sorted(path.name for path in folder.iterdir())
        foreign = [name for name in names if name not in OWN_NAMES and not WRITTEN_FILES.fullmatch(name)]
        if foreign:
            raise UserError(
                f"{folder} would be replaced, but holds {', '.join(foreign)}, which no export wrote; move it away or "
                f"choose another --out"
            )
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")


def write_inference_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ExportConfig,
    tokenizer: MultiScaleVQVAE,
    public_extras: Mapping[str, Tensor] | None = None,
    text_encoder_copy: Path | None = None,
) -> None:
    """Writes the folder beside its final place, reloads and compares it, and then moves it there.

    weights: by name; stored in `config.dtype`. config.text: the encoder to copy or to name. public_extras: see
    `public_layout.py`. text_encoder_copy: see `save_text_encoder`. A process that is killed leaves what it has written,
    and an earlier export that it had moved away, in `<folder>.export-…`, which is for its owner to delete.

    Raises:
        UserError: the folder holds something else than an earlier export, weights are not finite, or the text encoder
            cannot be copied.
    """
    check_replaceable(folder)
    folder = folder.resolve()  # a link stays one
    stored = {name: tensor.to(DTYPES[config.dtype]) for name, tensor in weights.items()}
    for name, tensor in stored.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds values that are not finite, which draw nothing; take an earlier checkpoint")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A new name, so that nothing of anybody's is in the way.
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.export-", dir=folder.parent))
    partial, earlier = work / "new", work / "earlier"
    try:
        partial.mkdir()
        _write_files(partial, stored, config, tokenizer, public_extras, text_encoder_copy)
        if folder.exists():
            os.replace(folder, earlier)
        os.replace(partial, folder)
    finally:
        if earlier.is_dir() and not folder.exists():  # ended between the two moves
            os.replace(earlier, folder)
        shutil.rmtree(work, ignore_errors=True)


def _write_files(
    partial: Path,
    stored: Mapping[str, Tensor],
    config: ExportConfig,
    tokenizer: MultiScaleVQVAE,
    public_extras: Mapping[str, Tensor] | None,
    text_encoder_copy: Path | None,
) -> None:
    """Fills an empty folder, and reloads and compares it."""
    write_weights(stored, partial)
    if public_extras:
        save_file(dict(public_extras), partial / PUBLIC_EXTRAS_FILE, metadata={"format": "pt"})
    save_tokenizer(tokenizer, partial / TOKENIZER_FOLDER)
    text = save_text_encoder(config.text, partial / TEXT_ENCODER_FOLDER, text_encoder_copy)
    config = config.model_copy(update={"text": text})
    (partial / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n")
    (partial / CARD_FILE).write_text(model_card(config.model_dump(mode="json")))

    _, model = load_model(partial)
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter.detach(), stored[name]):
            raise RuntimeError(f"{partial}: {name} changed while it was written; the disk may be failing")
    load_export_tokenizer(partial, config)
    readable = (partial / CONFIG_FILE).stat().st_mode  # safetensors makes files that only their owner can read
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(readable)


def read_export_config(folder: Path) -> ExportConfig:
    """Reads and validates `config.json` of an inference folder.

    Raises:
        UserError: no inference folder there, or a damaged one.
    """
    path = folder / CONFIG_FILE
    no_folder = f"{folder} is no inference folder (launcher/export.py makes one of a run)"
    values = read_json_object(path, absent=f"{no_folder}: it has no {CONFIG_FILE}")
    if values.get("format") != FORMAT:
        raise UserError(f"{no_folder}: {path} has format {values.get('format')!r}, expected {FORMAT!r}")
    try:
        return ExportConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{path} is damaged: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def fetch_inference_folder(source: str | Path, revision: str | None = None) -> Path:
    """A folder as it is, or the local copy of a Hugging Face model id, fetched where it is not there yet.

    Raises:
        UserError: neither. Unavailable: the hub does not answer.
    """
    folder = Path(source)
    if folder.exists() or not HUB_ID.fullmatch(str(source)):
        if revision is not None:
            raise UserError(f"revision {revision!r} is of a Hugging Face id, but {folder} is none")
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except (OSError, ValueError) as error:  # what the hub's own errors and those of the network are kinds of
        message = f"there is no folder {source}, and no Hugging Face model of that id: {first_line(error)}"
        raise hub_error(error, message) from None


def load_model(folder: Path, dtype: torch.dtype | None = None, attention: str = "auto") -> tuple[ExportConfig, STAR]:
    """The transformer of an inference folder, in eval mode on the CPU; `dtype` null keeps the stored one.

    Raises:
        UserError: no such folder, or weights that are damaged or do not fit.
    """
    config = read_export_config(folder)
    with torch.device("meta"):
        model = STAR(config.model, attention)
    weights = check_weights(read_weights_folder(folder), model, str(folder))
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


def load_public_extras(folder: Path) -> dict[str, Tensor]:
    """What only the public layout has of an inference folder's model: nothing where it was not converted from it."""
    path = folder / PUBLIC_EXTRAS_FILE
    return read_weights(path) if path.is_file() else {}


def initial_weights_from(source: str | Path, config: RunConfig, run_tokenizer_hash: str) -> dict[str, Tensor]:
    """Weights of an exported or converted model to start a run with (`train.init_from`), also for other scales.

    Level embeddings are taken from the exported level at the nearest relative position k / (K - 1): the same level
    where both schedules have equally many scales. Everything else is taken as it is.

    Raises:
        UserError: the model has another architecture or another tokenizer than the run.
    """
    folder = fetch_inference_folder(source)
    exported, model = load_model(folder, dtype=torch.float32)
    wanted = config.star_config()
    same_scales = dataclasses.replace(wanted, scales=exported.model.scales)
    check_architecture(source, exported.model, same_scales, "change the run's, or start from another train.init_from")
    if exported.tokenizer_hash != run_tokenizer_hash:
        raise UserError(
            f"{source} was trained on tokens of tokenizer {exported.tokenizer_hash}, the run's tokenizer.path has "
            f"{run_tokenizer_hash}; its tokens mean something else: use {source}/{TOKENIZER_FOLDER}"
        )
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    levels, old_levels = len(config.scales), len(exported.model.scales)
    nearest = [round(level / max(levels - 1, 1) * (old_levels - 1)) for level in range(levels)]
    weights["lvl_embed.weight"] = weights["lvl_embed.weight"][nearest]
    with torch.device("meta"):
        target = STAR(wanted, config.model.attention)
    return check_weights(weights, target, str(source))


def check_architecture(source: str | Path, trained: StarConfig, wanted: StarConfig, advice: str) -> None:
    """Raises an error that names the first option in which a trained model is another than is wanted.

    Raises:
        UserError: with both values and the advice.
    """
    for field in dataclasses.fields(StarConfig):
        before, now = getattr(trained, field.name), getattr(wanted, field.name)
        if before != now:
            raise UserError(f"{source} was trained with {_option(field.name)} {before}, the config has {now}; {advice}")


def other_text(source: str | Path, config: RunConfig) -> list[str]:
    """What differs between a run's text features and those that the model of its `train.init_from` has learned from.

    They are no mistake for certain: one encoder has many names, and another one is learned anew in time.
    """
    before = read_export_config(fetch_inference_folder(source)).text
    now = config.text.model_copy(update={"encoder": portable_name(config.text)})
    return [
        f"{source} was trained with text.{name} {getattr(before, name)}, the run has {getattr(now, name)}"
        for name in ("encoder", "pooling", "max_tokens")
        if getattr(before, name) != getattr(now, name)
    ]


def _option(field: str) -> str:
    """The option of a run's config that decides a field of the architecture."""
    other = {
        "scales": "scales",
        "vocab_size": "tokenizer.vocab_size",
        "code_dim": "tokenizer.code_dim",
        "text_width": "text.width",
    }
    return other.get(field, f"model.{field}")
