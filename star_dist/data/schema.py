"""The format of a data set: MDS columns, and the metadata file that says what the tokens mean.

    ROOT/dataset.json                 DatasetMetadata
    ROOT/empty_caption.safetensors    features of the empty caption, only where text features are stored
    ROOT/train/index.json             one MDS data set per split (mosaicml-streaming), merged from those of all
    ROOT/train/PARTITION/shard…       partitions of the job

Columns are plain bytes and text, so that any reader of any version can take them: `tokens` is the token maps of all
scales, flattened, coarse to fine, little-endian `token_dtype`; features are little-endian float16. A picture may have
several captions by name, each in a column of its own with its features beside it; one that is absent is empty. L
tokens, S text tokens, W text width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from star_dist.config import RunConfig, Section, TextSection
from star_dist.errors import UserError
from star_dist.files import parse_json_object

SCHEMA_VERSION = 2
METADATA_FILE = "dataset.json"
EMPTY_CAPTION_FILE = "empty_caption.safetensors"
SHARD_HASH = "xxh64"  # of every shard, in the index that MDSWriter writes
FEATURE_DTYPE = np.dtype("<f2")
UINT16_VALUES = 2**16
# What a tokenization job leaves before its partitions are merged (data_prep/job.py).
JOB_FILE, PARTS_FOLDER = "job.json", "parts"


class DatasetMetadata(Section):
    """What a trainer must know to use the shards.

    tokenizer_hash: `tokenizer_hash` of the VQ-VAE that made the tokens. text_features: the encoder whose features are
    stored, null where captions alone are. captions: how many samples have each named caption; all have the first.
    splits: samples of each split. content_hash: over the indices of all splits,
    which hold the shards' hashes. rejected: pictures left out, by reason.
    """

    schema_version: int = SCHEMA_VERSION
    tokenizer_hash: str
    vocab_size: int
    code_dim: int
    downsampling: int
    resolution: int
    scales: tuple[int, ...]
    token_dtype: str
    captions: dict[str, int]
    text_features: TextSection | None = None
    splits: dict[str, int]
    content_hash: str
    rejected: dict[str, int] = {}
    attribution: str = ""


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest unsigned type that holds every token."""
    return np.dtype("<u2") if vocab_size <= UINT16_VALUES else np.dtype("<u4")


def columns(caption_names: Iterable[str], with_features: bool) -> dict[str, str]:
    """MDS columns and their encodings."""
    found = {"key": "str", "tokens": "bytes"}
    for name in caption_names:
        found[f"caption_{name}"] = "str"
        if with_features:
            found |= {f"text_hidden_{name}": "bytes", f"text_pooled_{name}": "bytes"}
    return found


def encode_captions(
    key: str, captions: Mapping[str, str], features: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None
) -> dict[str, Any]:
    """The caption columns of one sample; empty captions have no features, which are (hidden (S, W), pooled (W,)).

    Raises:
        UserError: a feature is too large for float16.
    """
    sample: dict[str, Any] = {f"caption_{name}": caption for name, caption in captions.items()}
    for name in captions if features is not None else ():
        parts = features[name] if captions[name] else (np.empty(0), np.empty(0))
        for column, values in zip((f"text_hidden_{name}", f"text_pooled_{name}"), parts):
            with np.errstate(over="ignore"):  # found by the check that follows
                stored = values.astype(FEATURE_DTYPE)
            if not np.isfinite(stored).all():
                raise UserError(f"a text feature of {key!r} does not fit float16; store captions without features")
            sample[column] = stored.tobytes()
    return sample


def decode_captions(sample: Mapping[str, Any], metadata: DatasetMetadata) -> dict[str, str]:
    """The captions of one sample by name, in the data set's order, without the empty ones."""
    captions = {name: sample[f"caption_{name}"] for name in metadata.captions}
    return {name: caption for name, caption in captions.items() if caption}


def encode_tokens(tokens_L: np.ndarray, dtype: np.dtype) -> bytes:
    """The `tokens` column of one sample."""
    return tokens_L.astype(dtype).tobytes()


def decode_tokens(sample: Mapping[str, Any], metadata: DatasetMetadata) -> np.ndarray:
    """Tokens of one sample; (L,) of the data set's `token_dtype`, read-only."""
    return np.frombuffer(sample["tokens"], dtype=metadata.token_dtype)


def decode_features(sample: Mapping[str, Any], caption_name: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored text features of one caption; hidden (S, W) and pooled (W,), float16."""
    hidden = np.frombuffer(sample[f"text_hidden_{caption_name}"], dtype=FEATURE_DTYPE).reshape(-1, width)
    return hidden.copy(), np.frombuffer(sample[f"text_pooled_{caption_name}"], dtype=FEATURE_DTYPE).copy()


def content_hash(indices: Mapping[str, bytes]) -> str:
    """Identity of all samples of a data set, from the `index.json` of each split, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for split in sorted(indices):
        digest.update(indices[split])
    return digest.hexdigest()[:16]


def read_metadata(root: Path) -> DatasetMetadata:
    """Reads and validates `dataset.json` of a local data set.

    Raises:
        UserError: no data set there, or one of another schema version.
    """
    path = root / METADATA_FILE
    try:
        return parse_metadata(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UserError(f"no data set at {root}: {_why_there_is_none(root)}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _why_there_is_none(root: Path) -> str:
    found = sorted((path.parent for path in root.glob(f"*/{METADATA_FILE}")), key=lambda path: (len(path.name), path))
    if found:  # a job of several resolutions makes one of each
        return f"{METADATA_FILE} is in folders of it; give one of {', '.join(map(str, found))}"
    if (root / JOB_FILE).is_file() and (root / PARTS_FOLDER).is_dir():
        return f"its partitions are not merged yet (python -m data_prep.merge {root})"
    return f"{root / METADATA_FILE} does not exist (data_prep.tokenize writes it)"


def parse_metadata(text: bytes, place: str) -> DatasetMetadata:
    """Validates what a `dataset.json` holds; `place` names it in errors (see `read_metadata`)."""
    values = parse_json_object(text, place)
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(f"{place} has schema version {version}, this code reads {SCHEMA_VERSION}; tokenize again")
    try:
        return DatasetMetadata.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise UserError(f"{place} is damaged: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None


def check_matches(metadata: DatasetMetadata, config: RunConfig, tokenizer_hash: str, place: str) -> None:
    """Refuses shards that were made for another run; `place` names the data set in messages.

    Raises:
        UserError: naming the first difference, both values and what to change.
    """
    expected = {
        "tokenizer_hash": (tokenizer_hash, "tokenizer.path"),
        "vocab_size": (config.tokenizer.vocab_size, "tokenizer.vocab_size"),
        "code_dim": (config.tokenizer.code_dim, "tokenizer.code_dim"),
        "downsampling": (config.tokenizer.downsampling, "tokenizer.downsampling"),
        "resolution": (config.resolution, "resolution"),
        "scales": (config.scales, "scales"),
    }
    for name, (value, option) in expected.items():
        stored = getattr(metadata, name)
        if stored != value:
            raise UserError(
                f"the data set {place} has {name} {_shown(stored)}, the run has {_shown(value)}; "
                f"change {option} or data, or tokenize again"
            )
    for option, or_else in (("train_split", ""), ("validation_split", " (null, with validation.every 0, for none)")):
        split = getattr(config.data, option)
        if split is not None and not metadata.splits.get(split):
            raise UserError(
                f"the data set {place} has no samples in split {split!r}; it has {dict(metadata.splits)}; change "
                f"data.{option}{or_else}"
            )
    _check_captions(metadata, config.data.caption_weights, place)
    if config.data.text_features:
        if metadata.text_features is None:
            raise UserError(f"data.text_features is true but the data set {place} holds captions only; set it to false")
        if metadata.text_features != config.text:
            raise UserError(
                f"the text features of {place} were made with {metadata.text_features!r}, the run has {config.text!r}; "
                f"change text, or set data.text_features to false"
            )


def _check_captions(metadata: DatasetMetadata, weights: Mapping[str, float], place: str) -> None:
    """Every sample must have one of the captions that the run draws from."""
    for name in weights:
        if name not in metadata.captions:
            raise UserError(
                f"data.caption_weights has {name!r}, the data set {place} has {list(metadata.captions)}; change one"
            )
    samples = sum(metadata.splits.values())
    if weights and all(metadata.captions[name] < samples for name in weights):
        counts = ", ".join(f"{name}: {metadata.captions[name]}" for name in weights)
        raise UserError(
            f"none of data.caption_weights' captions is there for all {samples} samples ({counts}); give "
            f"{next(iter(metadata.captions))!r} a weight too"
        )


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
