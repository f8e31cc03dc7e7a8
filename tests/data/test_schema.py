import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from star_dist.config import RunConfig, TextSection
from star_dist.data.schema import (
    METADATA_FILE,
    check_matches,
    columns,
    decode_captions,
    decode_features,
    decode_tokens,
    encode_captions,
    encode_tokens,
    read_metadata,
    token_dtype,
)
from star_dist.errors import UserError


def test_samples_survive_a_round_trip(dataset_folder: Path) -> None:
    metadata = read_metadata(dataset_folder)
    tokens = np.array([0, 63, 5])
    features = np.full((3, 4), 0.5, dtype=np.float32), np.arange(4, dtype=np.float32)
    captions = {"original": "a caption", "recaptioned": ""}
    sample = encode_captions("key", captions, {"original": features}) | {
        "tokens": encode_tokens(tokens, token_dtype(64))
    }
    assert {"key"} | sample.keys() == columns(captions, with_features=True).keys()
    assert sample["tokens"] == b"\x00\x00\x3f\x00\x05\x00"
    assert decode_tokens(sample, metadata).tolist() == [0, 63, 5]
    assert decode_captions(sample, metadata.model_copy(update={"captions": captions})) == {"original": "a caption"}
    hidden, pooled = decode_features(sample, "original", width=4)
    assert hidden.shape == (3, 4) and pooled.tolist() == [0, 1, 2, 3]
    assert decode_features(sample, "recaptioned", width=4)[0].shape == (0, 4)


def test_large_codebooks_take_four_bytes() -> None:
    assert token_dtype(65536) == np.dtype("<u2")
    assert token_dtype(65537) == np.dtype("<u4")


def test_features_beyond_float16_are_refused() -> None:
    with pytest.raises(UserError, match="'key' does not fit float16"):
        encode_captions("key", {"original": "x"}, {"original": (np.full((1, 2), 1e6), np.zeros(2))})


def test_matching_shards_are_accepted(dataset_folder: Path, run_config: Callable[..., RunConfig]) -> None:
    metadata = read_metadata(dataset_folder)
    check_matches(metadata, run_config(), metadata.tokenizer_hash, "here")
    assert metadata.splits["train"] + metadata.splits["val"] == 60


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer_hash": "0123"}, r"tokenizer_hash 0123, the run has \w{16}; change tokenizer\.path"),
        ({"vocab_size": 128}, r"vocab_size 128, the run has 64"),
        ({"resolution": 32}, r"resolution 32, the run has 16"),
        ({"scales": (1, 4)}, r"scales \[1, 4\], the run has \[1, 2, 3, 4\]"),
        (
            {"splits": {"train": 3}},
            r"no samples in split 'val'; it has \{'train': 3\}; change data\.validation_split \(null",
        ),
    ],
)
def test_other_shards_are_refused_with_both_values(
    dataset_folder: Path, run_config: Callable[..., RunConfig], change: dict, said: str
) -> None:
    metadata = read_metadata(dataset_folder)
    with pytest.raises(UserError, match=said):
        check_matches(metadata.model_copy(update=change), run_config(), metadata.tokenizer_hash, "here")


def test_text_features_must_be_those_of_the_run(dataset_folder: Path, run_config: Callable[..., RunConfig]) -> None:
    metadata = read_metadata(dataset_folder)
    config = run_config(data={"text_features": True})
    with pytest.raises(UserError, match="holds captions only"):
        check_matches(metadata, config, metadata.tokenizer_hash, "here")
    other = metadata.model_copy(update={"text_features": TextSection(encoder="another")})
    with pytest.raises(UserError, match="were made with .*another"):
        check_matches(other, config, metadata.tokenizer_hash, "here")


def test_captions_that_the_data_set_cannot_give_are_refused(
    dataset_folder: Path, run_config: Callable[..., RunConfig]
) -> None:
    metadata = read_metadata(dataset_folder).model_copy(update={"captions": {"original": 60, "recaptioned": 59}})
    for weights in ({}, {"original": 1.0}, {"recaptioned": 2.0, "original": 0.5}):
        check_matches(metadata, run_config(data={"caption_weights": weights}), metadata.tokenizer_hash, "here")
    with pytest.raises(
        UserError, match=r"caption_weights has 'other', the data set here has \['original', 'recaptioned'\]"
    ):
        check_matches(metadata, run_config(data={"caption_weights": {"other": 1.0}}), metadata.tokenizer_hash, "here")
    with pytest.raises(UserError, match=r"all 60 samples \(recaptioned: 59\); give 'original' a weight too"):
        check_matches(
            metadata, run_config(data={"caption_weights": {"recaptioned": 1.0}}), metadata.tokenizer_hash, "here"
        )


def test_a_folder_beside_the_data_set_is_told_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "job.json").touch()
    said = rf"no data set at {tmp_path}: its partitions are not merged yet \(python -m data_prep\.merge {tmp_path}\)"
    with pytest.raises(UserError, match=said):
        read_metadata(tmp_path)
    for side in ("256", "1024", "512"):
        (tmp_path / side).mkdir()
        (tmp_path / side / METADATA_FILE).touch()
    with pytest.raises(UserError, match=rf"give one of {tmp_path}/256, {tmp_path}/512, {tmp_path}/1024$"):
        read_metadata(tmp_path)
    with pytest.raises(UserError, match=r"absent/dataset\.json does not exist \(data_prep\.tokenize writes it\)"):
        read_metadata(tmp_path / "absent")


def test_metadata_of_another_version_or_damaged(tmp_path: Path, dataset_folder: Path) -> None:
    with pytest.raises(UserError, match="no data set at"):
        read_metadata(tmp_path)
    (tmp_path / METADATA_FILE).write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="schema version 99, this code reads 2"):
        read_metadata(tmp_path)
    (tmp_path / METADATA_FILE).write_text('{"schema')
    with pytest.raises(UserError, match="is damaged"):
        read_metadata(tmp_path)
    values = json.loads((dataset_folder / METADATA_FILE).read_text())
    del values["scales"]
    (tmp_path / METADATA_FILE).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"is damaged: Field required at \('scales',\)"):
        read_metadata(tmp_path)
