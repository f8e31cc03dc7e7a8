"""What a tokenization job leaves at its output, and the description that every partition of it must share.

    OUTPUT/job.json                                 JobDescription, written by whichever partition starts first
    OUTPUT/parts/00003-of-00064.json                Manifest: written last, says that the partition is complete
    OUTPUT/parts/00003-of-00064.HASH/rejects.jsonl  pictures left out
    OUTPUT/train/00003-of-00064.HASH/shard.*        its samples, under OUTPUT/RESOLUTION where there are several
    OUTPUT/dataset.json, train/index.json, …        written by the merge

HASH is over the partition's own content: two workers that differ never write to the same place.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

from pydantic import ValidationError

from data_prep.partition import Partition
from data_prep.sources import SourceBase
from star_dist.config import CaptionConfig, ConfigError, PrepConfig, Section, TextSection, parse_config
from star_dist.data.schema import JOB_FILE, METADATA_FILE, PARTS_FOLDER, SCHEMA_VERSION, token_dtype
from star_dist.errors import UserError
from star_dist.object_store import FolderStore, ObjectStore, open_store
from star_dist.run_folder import differences
from star_dist.tokenizer.config import VQVAEConfig

REJECTS_FILE = "rejects.jsonl"
JOB_HASH_DIGITS = 16
WITHOUT_INFLUENCE = {"output", "work", "storage"}  # settings that leave the result as it is


JobConfig = TypeVar("JobConfig", PrepConfig, CaptionConfig)


class DatasetFacts(Section):
    """What the job knows of the data sets before the first picture; see `DatasetMetadata`."""

    tokenizer_hash: str
    vocab_size: int
    code_dim: int
    downsampling: int
    token_dtype: str
    caption_names: tuple[str, ...]
    text_features: TextSection | None


class JobDescription(Section):
    """config: as resolved, without what has no influence. partitions: their number. units, source_hash: of the source
    when the job began, so that pictures added later do not shift the others between partitions."""

    schema_version: int = SCHEMA_VERSION
    config: dict[str, Any]
    partitions: int
    units: int
    source_hash: str
    dataset: DatasetFacts

    @property
    def hash(self) -> str:
        """Identity of the job, as 16 hexadecimal digits; depends on the order of the config's keys (see `join_job`)."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:JOB_HASH_DIGITS]


class StoredFile(Section):
    """One file of a partition; sha256 in hexadecimal digits."""

    bytes: int
    sha256: str


class Manifest(Section):
    """A complete partition. Keys of the inner tables are resolutions as text, then splits or names of captions.

    read: items of the source. too_small: pictures that a resolution alone leaves out. files: by name under the output.
    """

    schema_version: int = SCHEMA_VERSION
    partition: int
    partitions: int
    job_hash: str
    folder: str
    read: int
    rejected: dict[str, int]
    samples: dict[str, dict[str, int]]
    captions: dict[str, dict[str, int]]
    too_small: dict[str, int]
    files: dict[str, StoredFile]

    @property
    def kept(self) -> int:
        return self.read - sum(self.rejected.values())


def output_store(config: PrepConfig) -> ObjectStore:
    return open_store(config.output, endpoint=config.storage.endpoint, region=config.storage.region)


def splits_of(config: PrepConfig) -> tuple[str, ...]:
    return ("train", "val") if config.validation_fraction else ("train",)


def manifest_name(partition: Partition) -> str:
    return f"{PARTS_FOLDER}/{partition.name}.json"


def identity(config: PrepConfig | CaptionConfig) -> dict[str, Any]:
    """The config as far as it decides the result of a partition that comes to its end."""
    values = json.loads(config.model_dump_json(exclude=WITHOUT_INFLUENCE))
    values["source"].pop("damaged_units", None)  # a unit that one value leaves out keeps the other from ending
    return values


def stored_config(kind: type[JobConfig], values: dict[str, Any], output: str) -> JobConfig:
    """The config of the job at an output, maybe begun by older code: options that it lacks have their defaults, which
    do as the code before them did.

    Raises:
        UserError: it is no such job's, or has an option that this code does not know.
    """
    try:
        return parse_config(kind, values | {"output": output}, source=f"{output}/{JOB_FILE}")
    except ConfigError as error:
        raise UserError(f"{output} is of another job, or of other code: {error}; change output") from None


def describe_job(
    config: PrepConfig, source: SourceBase, tokenizer: VQVAEConfig, tokenizer_hash: str, partitions: int
) -> JobDescription:
    """The description that all partitions of this job come to."""
    return JobDescription(
        config=identity(config),
        partitions=partitions,
        units=len(source.units),
        source_hash=source_hash(source),
        dataset=DatasetFacts(
            tokenizer_hash=tokenizer_hash,
            vocab_size=tokenizer.vocab_size,
            code_dim=tokenizer.code_dim,
            downsampling=tokenizer.downsampling,
            token_dtype=token_dtype(tokenizer.vocab_size).str,
            caption_names=source.caption_names,
            text_features=config.text_features,
        ),
    )


def source_hash(source: SourceBase) -> str:
    """Identity of the names of a source's units."""
    # A file's name may be no Unicode, which Python holds as lone surrogates.
    names = "\n".join(source.units).encode(errors="surrogatepass")
    return hashlib.sha256(names).hexdigest()[:JOB_HASH_DIGITS]


def read_job(store: ObjectStore) -> JobDescription | None:
    """The job that an output belongs to; None where nothing has begun.

    Raises:
        UserError: the description is damaged, or of another schema version.
    """
    return _read(store, JOB_FILE, JobDescription)


def read_manifest(store: ObjectStore, name: str) -> Manifest | None:
    """A partition's manifest; None where the partition is not complete.

    Raises:
        UserError: the manifest is damaged.
    """
    return _read(store, name, Manifest)


def write_section(store: ObjectStore, name: str, section: Section) -> None:
    store.write(name, (section.model_dump_json(indent=2) + "\n").encode())


def is_merged(store: ObjectStore, config: PrepConfig) -> bool:
    """Whether the data sets of all resolutions are complete."""
    sections = config.all_resolutions
    return all(store.exists(f"{config.folder_of(section.resolution)}{METADATA_FILE}") for section in sections)


def check_same_job(store: ObjectStore, stored: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares descriptions of jobs.

    Raises:
        UserError: the output belongs to another job; names the first difference.
    """
    for key, before, value in differences(stored, now):
        raise UserError(
            f"{store.url} holds a data set made with {key} = {json.dumps(before)}, this job has {json.dumps(value)}; "
            f"change output, or remove the folder"
        )


def join_job(store: ObjectStore, job: JobDescription) -> JobDescription:
    """Begins a job at its output, or joins the partitions that have begun it; returns the description that is there.

    Its hash is the job's: another partition's config may have the same keys in another order.

    Raises:
        UserError: the output holds something else, or belongs to another job.
    """
    stored = read_job(store)
    if stored is None:
        if isinstance(store, FolderStore) and store.path.exists() and not store.path.is_dir():
            raise UserError(f"output {store.url} exists and is no data set; choose another output")
        if any(not entry.name.startswith(JOB_FILE) for entry in store.list()) and read_job(store) is None:
            raise UserError(f"output {store.url} exists and is no data set; choose another output")
        write_section(store, JOB_FILE, job)
        stored = read_job(store)  # another partition may have begun another job at the same time
    check_same_job(store, _flat(stored, store.url), _flat(job, store.url))
    return stored


def _flat(job: JobDescription, output: str) -> dict[str, Any]:
    """Options as the user names them, then what follows from tokenizer, source and command."""
    facts = json.loads(job.model_dump_json(exclude={"config"}))
    return identity(stored_config(PrepConfig, job.config, output)) | facts


def _read(store: ObjectStore, name: str, kind: type[Section]) -> Any:
    try:
        data = store.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        version = json.loads(data).get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{store.url}/{name} has schema version {version}, this code writes {SCHEMA_VERSION}; change "
                f"output, or remove the folder"
            )
        return kind.model_validate_json(data)
    except (json.JSONDecodeError, AttributeError):
        raise UserError(f"{store.url}/{name} is damaged: it holds no JSON object; remove it") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{store.url}/{name} is damaged: {problem['msg']} at {problem['loc']}; remove it") from None
