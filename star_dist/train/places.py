"""Where checkpoints lie: a folder that all nodes see, or S3. Imports no torch.

A place holds folders of files. Both kinds offer the same few operations, and a file is there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from star_dist.object_store import S3Store


class Place(Protocol):
    """Folders of files, by name; every operation raises OSError when it fails."""

    def folders(self) -> list[str]:
        """Names of all folders, in no order."""

    def files(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of the files of a folder, by name; empty where there is no such folder."""

    def writing(self, folder: str, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to write a file to; on leaving the context without an exception the file is durably there."""

    def reading(self, folder: str, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to read a file from, valid inside the context."""

    def create(self, folder: str) -> None:
        """Makes an empty folder."""

    def remove(self, folder: str, first: str) -> None:
        """Removes a folder, its file `first` before all others."""

    def rename(self, folder: str, target: str) -> None:
        """Gives a folder another name."""

    def free_bytes(self) -> int | None:
        """Room left; None where there is no limit to know of."""


class LocalPlace:
    """A folder of a file system that all nodes share (or of one machine)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def folders(self) -> list[str]:
        return [path.name for path in self.root.iterdir() if path.is_dir()] if self.root.is_dir() else []

    def files(self, folder: str) -> dict[str, int]:
        path = self.root / folder
        return {file.name: file.stat().st_size for file in path.iterdir()} if path.is_dir() else {}

    @contextlib.contextmanager
    def writing(self, folder: str, name: str) -> Iterator[Path]:
        path = self.root / folder / name
        partial = path.with_name(f"{name}.partial")
        yield partial
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner reads
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)

    @contextlib.contextmanager
    def reading(self, folder: str, name: str) -> Iterator[Path]:
        yield self.root / folder / name

    def create(self, folder: str) -> None:
        (self.root / folder).mkdir(parents=True)
        _sync(self.root)

    def remove(self, folder: str, first: str) -> None:
        (self.root / folder / first).unlink(missing_ok=True)
        if (self.root / folder).exists():
            shutil.rmtree(self.root / folder)

    def rename(self, folder: str, target: str) -> None:
        (self.root / folder).rename(self.root / target)

    def free_bytes(self) -> int | None:
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free


class S3Place:
    """A prefix of a bucket, `s3://bucket/prefix`. Credentials and endpoint come from the environment, as for any tool.

    Files are written to and read from a local temporary folder (TMPDIR).
    """

    def __init__(self, url: str) -> None:
        self._store = S3Store(url)
        self.bucket = self._store.bucket

    def __str__(self) -> str:
        return self._store.url

    @property
    def _client(self) -> Any:
        return self._store.client

    def _key(self, *names: str) -> str:
        return self._store.prefix + "/".join(names)

    def _list(self, prefix: str, **options: Any) -> Iterator[dict[str, Any]]:
        with _as_os_error():
            yield from self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix, **options
            )

    def folders(self) -> list[str]:
        pages = self._list(self._key(""), Delimiter="/")
        prefixes = (found["Prefix"] for page in pages for found in page.get("CommonPrefixes", ()))
        return [prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in prefixes]

    def files(self, folder: str) -> dict[str, int]:
        prefix = self._key(folder, "")
        objects = (found for page in self._list(prefix) for found in page.get("Contents", ()))
        return {found["Key"].removeprefix(prefix): found["Size"] for found in objects}

    @contextlib.contextmanager
    def writing(self, folder: str, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="star-dist-") as temporary:
            path = Path(temporary) / name
            yield path
            with _as_os_error():
                self._client.upload_file(str(path), self.bucket, self._key(folder, name))

    @contextlib.contextmanager
    def reading(self, folder: str, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="star-dist-") as temporary:
            path = Path(temporary) / name
            with _as_os_error():
                self._client.download_file(self.bucket, self._key(folder, name), str(path))
            yield path

    def create(self, folder: str) -> None:
        """Nothing: S3 has no folders without objects."""

    def remove(self, folder: str, first: str) -> None:
        names = sorted(self.files(folder), key=lambda name: name != first)
        with _as_os_error():
            for name in names:
                self._client.delete_object(Bucket=self.bucket, Key=self._key(folder, name))

    def rename(self, folder: str, target: str) -> None:
        """Copies on the server, then removes; S3 has no renaming."""
        for name in self.files(folder):
            with _as_os_error():
                source = {"Bucket": self.bucket, "Key": self._key(folder, name)}
                self._client.copy(source, self.bucket, self._key(target, name))
        self.remove(folder, first="")

    def free_bytes(self) -> int | None:
        return None

    def check_access(self) -> None:
        """Lists the prefix, and reads the first bytes of an object in it if there is one."""
        with _as_os_error():
            found = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._key(""), MaxKeys=1).get(
                "Contents", ()
            )
            for entry in found:
                self._client.get_object(Bucket=self.bucket, Key=entry["Key"], Range="bytes=0-99")["Body"].read()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """boto3 has a family of exceptions of its own; callers know one kind of failure."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
