"""Public STAR transformers and VAR tokenizers to inference folders, and inference folders to the public layout.

Both ways are exact: every tensor keeps its values, and what the public layout has beyond our parameters comes back as
it was (`public_layout.py`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from star_dist.config import Section, parse_config
from star_dist.errors import UserError
from star_dist.export import (
    TEXT_ENCODER_FOLDER,
    ExportConfig,
    fetch_inference_folder,
    load_export_tokenizer,
    load_model,
    load_public_extras,
    write_inference_folder,
)
from star_dist.files import read_json_object, write_text_atomically
from star_dist.model.star import STAR
from star_dist.model_card import ModelFacts
from star_dist.public_layout import (
    CLASS_EMBEDDING,
    PublicCheckpointOptions,
    check_weights,
    infer_star_config,
    infer_tokenizer_config,
    public_weights,
)
from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.io import build_tokenizer, tokenizer_hash
from star_dist.weights import read_weights, writing

EXACT_IN_FP32 = (torch.float32, torch.bfloat16, torch.float16)
TRANSFORMER_FILE = "star"
TOKENIZER_FILE = "vae"
RECORD_FILE = "conversion.json"
# In place of its name in older records: the folder beside them, which no Hugging Face id can be.
UNNAMED_TEXT_ENCODER = f"./{TEXT_ENCODER_FOLDER}"


class RecordedSource(Section):
    """The inference folder that a record was made of, as `ExportConfig` has it."""

    run_name: str
    step: int
    facts: ModelFacts = ModelFacts()  # older records have none


class ConversionRecord(PublicCheckpointOptions):
    """What `from_public` takes from the record of `to_public`; the defaults are for where there is none.

    text_encoder_copied: whether a copy of `text.encoder` lies in `text_encoder` beside the record.
    """

    text_encoder_copied: bool = False
    source: RecordedSource | None = None


def from_public(
    transformer: Path, tokenizer: Path, out: Path, given: PublicCheckpointOptions, licence: str | None = None
) -> ExportConfig:
    """Writes the inference folder of public checkpoint files (.pth or .safetensors); returns what its config says.

    Sizes are read off the tensors. What they do not tell is `given`, or stands in the record of `to_public` beside the
    transformer. The text encoder's width is set to what the transformer takes. bf16 weights stay bf16; others are
    stored in fp32, which holds fp16 exactly. licence: of the weights; None takes the record's.

    Raises:
        UserError: files that are damaged or hold something else, scales for another number of levels, or a record
            that says otherwise than `given`.
    """
    record = transformer.parent / RECORD_FILE
    untold = _with_record(given, record)
    if not untold.scales:
        raise UserError(
            f"there is no {record} that tells the scales, and the public models of 256 and 512 pixels both have ten "
            f"scales: give --resolution or --scales"
        )
    weights = read_weights(transformer)
    config = infer_star_config(weights, untold, str(transformer))
    with torch.device("meta"):
        model = STAR(config)
    kept = check_weights(weights, model, str(transformer))
    dtypes = {tensor.dtype for tensor in kept.values()}
    foreign = sorted(str(dtype) for dtype in dtypes - set(EXACT_IN_FP32))
    if foreign:
        raise UserError(f"{transformer} holds {', '.join(foreign)}; weights are stored in bf16 or fp32")
    tokenizer_weights = read_weights(tokenizer)
    tokenizer_config = infer_tokenizer_config(tokenizer_weights, untold, str(tokenizer))
    for name in ("vocab_size", "code_dim"):
        ours, theirs = getattr(config, name), getattr(tokenizer_config, name)
        if ours != theirs:
            raise UserError(f"{transformer} has {name} {ours}, {tokenizer} has {theirs}; they are not of one model")
    vqvae = build_tokenizer(tokenizer_config, tokenizer_weights, str(tokenizer))
    found = tokenizer_hash(vqvae)
    if untold.tokenizer_hash not in (None, found):
        raise UserError(
            f"{record} is of a model with tokenizer {untold.tokenizer_hash}, {tokenizer} has {found}; take the files "
            f"that were written with it, or move it away and give the options"
        )
    made_by = (
        f"converted from {transformer.name} (sha256 {_sha256(transformer)}) and {tokenizer.name} "
        f"(sha256 {_sha256(tokenizer)})"
    )
    before = untold.source or RecordedSource(run_name=transformer.stem, step=0)
    facts = {"source": "; ".join(filter(None, (before.facts.source, made_by)))}
    if licence is not None:
        facts["licence"] = licence
    export = ExportConfig(
        model=config,
        text=untold.text.model_copy(update={"width": config.text_width}),
        tokenizer_hash=found,
        resolution=ScaleSchedule(config.scales).resolution(tokenizer_config.downsampling),
        dtype="bf16" if dtypes == {torch.bfloat16} else "fp32",
        run_name=before.run_name,
        step=before.step,
        facts=before.facts.model_copy(update=facts),
    )
    extras = {name: tensor.contiguous() for name, tensor in weights.items() if name == CLASS_EMBEDDING}
    copy = transformer.parent / TEXT_ENCODER_FOLDER if untold.text_encoder_copied else None
    write_inference_folder(out, kept, export, vqvae, extras, copy)
    return export


def to_public(source: str | Path, out: Path, kind: Literal["pth", "safetensors"]) -> dict[str, Any]:
    """Writes `star`, `vae` and a record of what the files do not say into a new folder; returns the record.

    A text encoder that the inference folder has a copy of is copied too. What fails leaves no folder.

    Raises:
        UserError: no inference folder, one that the public code cannot express, or an `out` that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another --out")
    folder = fetch_inference_folder(source)
    config, model = load_model(folder)
    tokenizer = load_export_tokenizer(folder, config)
    extras = load_public_extras(folder)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    public = public_weights(weights, config.model, extras.get(CLASS_EMBEDDING))
    copied = folder / TEXT_ENCODER_FOLDER
    recorded = ConversionRecord(
        scales=config.model.scales,
        tokenizer_scales=tokenizer.config.scales,
        rope_convention=config.model.rope_convention,
        rope_theta=config.model.rope_theta,
        rope_extent=config.model.rope_extent,
        norm_groups=tokenizer.config.norm_groups,
        text=config.text,
        tokenizer_hash=config.tokenizer_hash,
        text_encoder_copied=copied.is_dir(),
        source=RecordedSource(run_name=config.run_name, step=config.step, facts=config.facts),
    )
    record = {
        "public_code_must_change": recorded.public_code_must_change(),
        "resolution": config.resolution,
        "class_embedding": "as converted" if extras else "zeros; no computation uses it",
        **recorded.model_dump(mode="json"),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(public, out / f"{TRANSFORMER_FILE}.{kind}")
        _write(tokenizer.state_dict(), out / f"{TOKENIZER_FILE}.{kind}")
        if recorded.text_encoder_copied:
            _copy_folder(copied, out / TEXT_ENCODER_FOLDER)
        write_text_atomically(out / RECORD_FILE, json.dumps(record, indent=2) + "\n")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # in the way of another attempt
        raise
    return record


def _with_record(given: PublicCheckpointOptions, path: Path) -> ConversionRecord:
    """What the record of `to_public` says, where there is one, and what was given where it says nothing.

    Raises:
        UserError: the two contradict each other, or the record is damaged.
    """
    values = read_json_object(path, f"{path} does not exist") if path.is_file() else {}
    known = {name: values[name] for name in ConversionRecord.model_fields if name in values}
    recorded = parse_config(ConversionRecord, known, str(path))
    unrecorded = given.model_fields_set - recorded.model_fields_set
    untold = recorded.model_copy(update={name: getattr(given, name) for name in unrecorded})
    for prefix, typed, result in (("", given, untold), ("text.", given.text, untold.text)):
        for name in sorted(typed.model_fields_set - {"text"}):
            ours, theirs = getattr(typed, name), getattr(result, name)
            if ours != theirs:
                raise UserError(
                    f"{path} says that {prefix}{name} is {theirs}, the options say {ours}; leave it out of the "
                    f"options, or change the file"
                )
    unnamed = untold.text.encoder == UNNAMED_TEXT_ENCODER
    folder = path.parent / TEXT_ENCODER_FOLDER
    if (unnamed or untold.text_encoder_copied) and not folder.is_dir():
        raise UserError(
            f"{path} says that the text encoder lies beside it, but {folder} is no folder; put it there, or "
            f"change {'text.encoder' if unnamed else 'text_encoder_copied'} in the file"
        )
    if unnamed:
        untold = untold.model_copy(update={"text": untold.text.model_copy(update={"encoder": str(folder)})})
    return untold


def _write(weights: Mapping[str, Tensor], path: Path) -> None:
    # Clones, because saving a view would save all of what it is a view of.
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    with writing(path):
        if path.suffix == ".safetensors":
            save_file(weights, path, metadata={"format": "pt"})
        else:
            with path.open("wb") as file:  # of a path PyTorch does not tell why it cannot be written
                torch.save(weights, file)


def _copy_folder(source: Path, target: Path) -> None:
    """As `shutil.copytree`, whose error does not tell why a file cannot be written."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
