"""The format of a data set: MDS columns, and the metadata file that says what the tokens mean.

    ROOT/dataset.json                 DatasetMetadata
    ROOT/empty_caption.safetensors    features of the empty caption, only where text features are stored
    ROOT/train/index.json, shard…     one MDS data set per split (mosaicml-streaming)

Columns are plain bytes, so that any reader of any version can take them: `tokens` is the token maps of all scales,
flattened, coarse to fine, little-endian `token_dtype`; features are little-endian float16. L tokens, S text tokens, W
text width.
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
from star_dist.files import read_json_object

SCHEMA_VERSION = 1
METADATA_FILE = "dataset.json"
EMPTY_CAPTION_FILE = "empty_caption.safetensors"
SHARD_HASH = "xxh64"  # of every shard, in the index that MDSWriter writes
FEATURE_DTYPE = np.dtype("<f2")
UINT16_VALUES = 2**16


class DatasetMetadata(Section):
    """What a trainer must know to use the shards.

    tokenizer_hash: `tokenizer_hash` of the VQ-VAE that made the tokens. text_features: the encoder whose features are
    stored, null where captions alone are. splits: samples of each split. content_hash: over the indices of all splits,
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
    text_features: TextSection | None = None
    splits: dict[str, int]
    content_hash: str
    rejected: dict[str, int] = {}
    attribution: str = ""


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest unsigned type that holds every token."""
    return np.dtype("<u2") if vocab_size <= UINT16_VALUES else np.dtype("<u4")


def columns(with_features: bool) -> dict[str, str]:
    """MDS columns and their encodings."""
    plain = {"key": "str", "caption": "str", "tokens": "bytes"}
    return plain | ({"text_hidden": "bytes", "text_pooled": "bytes"} if with_features else {})


def encode_sample(
    key: str, caption: str, tokens_L: np.ndarray, dtype: np.dtype, features: tuple[np.ndarray, np.ndarray] | None = None
) -> dict[str, Any]:
    """One sample as MDS columns; `features` are (hidden (S, W), pooled (W,)).

    Raises:
        UserError: a feature is too large for float16.
    """
    sample: dict[str, Any] = {"key": key, "caption": caption, "tokens": tokens_L.astype(dtype).tobytes()}
    if features is not None:
        for name, values in zip(("text_hidden", "text_pooled"), features):
            with np.errstate(over="ignore"):  # found by the check that follows
                stored = values.astype(FEATURE_DTYPE)
            if not np.isfinite(stored).all():
                raise UserError(f"a text feature of {key!r} does not fit float16; store captions without features")
            sample[name] = stored.tobytes()
    return sample


def decode_tokens(sample: Mapping[str, Any], metadata: DatasetMetadata) -> np.ndarray:
    """Tokens of one sample; (L,) int64."""
    return np.frombuffer(sample["tokens"], dtype=metadata.token_dtype).astype(np.int64)


def decode_features(sample: Mapping[str, Any], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored text features of one sample; hidden (S, W) and pooled (W,), float16."""
    hidden = np.frombuffer(sample["text_hidden"], dtype=FEATURE_DTYPE).reshape(-1, width)
    return hidden.copy(), np.frombuffer(sample["text_pooled"], dtype=FEATURE_DTYPE).copy()


def content_hash(root: Path, splits: Iterable[str]) -> str:
    """Identity of all samples of a data set, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for split in sorted(splits):
        digest.update((root / split / "index.json").read_bytes())
    return digest.hexdigest()[:16]


def write_metadata(root: Path, metadata: DatasetMetadata) -> None:
    (root / METADATA_FILE).write_text(metadata.model_dump_json(indent=2) + "\n")


def read_metadata(root: Path) -> DatasetMetadata:
    """Reads and validates `dataset.json`.

    Raises:
        UserError: no data set there, or one of another schema version.
    """
    path = root / METADATA_FILE
    absent = f"no data set at {root}: {path} does not exist (data_prep.tokenize writes it)"
    values = read_json_object(path, absent)
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {version}, this code reads {SCHEMA_VERSION}; tokenize again")
    try:
        return DatasetMetadata.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None


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
    for split in filter(None, (config.data.train_split, config.data.validation_split)):
        if not metadata.splits.get(split):
            raise UserError(f"the data set {place} has no samples in split {split!r}; it has {dict(metadata.splits)}")
    if config.data.text_features:
        if metadata.text_features is None:
            raise UserError(f"data.text_features is true but the data set {place} holds captions only; set it to false")
        if metadata.text_features != config.text:
            raise UserError(
                f"the text features of {place} were made with {metadata.text_features!r}, the run has {config.text!r}; "
                f"change text, or set data.text_features to false"
            )


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
