"""Where checkpoints lie: a folder that all nodes see, or S3. Imports no torch.

A place holds folders of files. Both kinds offer the same few operations, and a file is there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from star_dist.files import free_bytes, sync_to_disk
from star_dist.object_store import S3Store


class Place(Protocol):
    """Folders of files, by name; every operation raises OSError when it fails, on S3 also UserError with the reason."""

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
        sizes = {}
        # Another thread or node may be removing the folder at this moment.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for file in (self.root / folder).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    sizes[file.name] = file.stat().st_size
        return sizes

    @contextlib.contextmanager
    def writing(self, folder: str, name: str) -> Iterator[Path]:
        path = self.root / folder / name
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} here; all nodes must write to the same place")
        partial = path.with_name(f"{name}.partial")
        yield partial
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner reads
        sync_to_disk(partial)
        os.replace(partial, path)
        sync_to_disk(path.parent)

    @contextlib.contextmanager
    def reading(self, folder: str, name: str) -> Iterator[Path]:
        yield self.root / folder / name

    def create(self, folder: str) -> None:
        (self.root / folder).mkdir(parents=True)
        sync_to_disk(self.root)

    def remove(self, folder: str, first: str) -> None:
        (self.root / folder / first).unlink(missing_ok=True)
        if (self.root / folder).exists():
            shutil.rmtree(self.root / folder)

    def rename(self, folder: str, target: str) -> None:
        (self.root / folder).rename(self.root / target)

    def free_bytes(self) -> int | None:
        return free_bytes(self.root)


class S3Place:
    """A prefix of a bucket, `s3://bucket/prefix`; endpoint and region as `S3Store` takes them.

    The client is made at once, so that what is later set in the environment for a data set does not move it. Files are
    written to and read from a local temporary folder (TMPDIR).

    Raises:
        UserError: no bucket in the URL, or an AWS profile or endpoint that cannot be used.
    """

    def __init__(self, url: str, endpoint: str | None = None, region: str | None = None) -> None:
        self._store = S3Store(url, endpoint, region)
        _ = self._store.client

    def __str__(self) -> str:
        return self._store.url

    def folders(self) -> list[str]:
        return list(self._store.folders())

    def files(self, folder: str) -> dict[str, int]:
        prefix = f"{folder}/"
        return {entry.name.removeprefix(prefix): entry.num_bytes for entry in self._store.list(prefix)}

    @contextlib.contextmanager
    def writing(self, folder: str, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="star-dist-") as temporary:
            path = Path(temporary) / name
            yield path
            self._store.upload(path, f"{folder}/{name}")

    @contextlib.contextmanager
    def reading(self, folder: str, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="star-dist-") as temporary:
            path = Path(temporary) / name
            self._store.download(f"{folder}/{name}", path)
            yield path

    def create(self, folder: str) -> None:
        """Nothing: S3 has no folders without objects."""

    def remove(self, folder: str, first: str) -> None:
        names = [f"{folder}/{name}" for name in self.files(folder)]
        marker = f"{folder}/{first}"
        if marker in names:
            self._store.delete([marker])
            names.remove(marker)
        self._store.delete(names)

    def rename(self, folder: str, target: str) -> None:
        """Copies on the server, then removes; S3 has no renaming."""
        for name in self.files(folder):
            self._store.copy(f"{folder}/{name}", f"{target}/{name}")
        self.remove(folder, first="")

    def free_bytes(self) -> int | None:
        return None

    def check_access(self) -> None:
        """Lists the prefix, and reads the first bytes of an object in it if there is one."""
        found = next(self._store.list(), None)
        if found is not None:
            self._store.read_start(found.name)

    def check_writing(self) -> None:
        """Writes a small object of its own, and removes it."""
        name = f"write-check-{uuid.uuid4().hex[:12]}"
        self._store.write(name, b"preflight")
        self._store.delete([name])
