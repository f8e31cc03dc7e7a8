"""Pictures of each training step as a pure function of (seed, step), whatever the number of ranks and resumes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from star_dist.data.loading import leave_sigterm_to_the_rank, next_batch
from star_dist.data.pictures import PICTURE_SUFFIXES, PictureFiles, UnreadablePicture, normalize
from star_dist.errors import UserError
from star_dist.object_store import FolderStore


class PicturePaths(Sequence[Path]):
    """Files under a folder, held as bytes.

    Ten million Path objects take 13 GB in every rank, and 3 GB more in each of its workers, which copy the pages of all
    that they read because Python counts references there.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        encoded = [os.fsencode(name) for name in names]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """Relative to the folder."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._names[start : self._ends[index]])

    def __getitem__(self, index: int) -> Path:
        return self.folder / self.name(range(len(self))[index])


def find_pictures(folder: Path) -> PicturePaths:
    """All picture files under a folder, sorted; links to folders are followed.

    Raises:
        UserError: no such folder, no pictures in it, or a folder in it that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"no folder of pictures at {folder}; change data.pictures")
    names = [
        entry.name
        for entry in FolderStore(str(folder)).list()
        if PurePosixPath(entry.name).suffix.lower() in PICTURE_SUFFIXES
    ]
    if not names:
        raise UserError(f"{folder} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}); change data.pictures")
    names.sort(key=lambda name: name.replace("/", "\0"))  # folder by folder, as paths are
    return PicturePaths(folder, names)


def fingerprint(paths: PicturePaths) -> str:
    """Identity of a list of pictures: their names, which decide the order of training."""
    digest = hashlib.sha256()
    for i in range(len(paths)):
        # A file's name may be no Unicode, which Python holds as lone surrogates.
        digest.update(("\n" * (i > 0) + paths.name(i)).encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


@dataclass
class Batch:
    """pictures: (B, 3, side, side) float32 in [-1, 1]. unreadable: reason by file of pictures that were skipped."""

    pictures: Tensor
    unreadable: dict[str, str]


class ReadablePictures:
    """Pictures by index, where an unreadable one gives way to the next that can be read.

    So every batch is full whatever is damaged, and the same in every run. keep_in_memory: each process decodes a
    picture once.
    """

    def __init__(self, paths: Sequence[Path], side: int, *, keep_in_memory: bool) -> None:
        self.paths = paths
        self.side = side
        self.kept: dict[int, Tensor] | None = {} if keep_in_memory else None
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, skipped: dict[str, str]) -> Tensor:
        """(3, side, side) uint8; adds what it skips to `skipped`.

        Raises:
            UserError: not one picture can be read.
            Unavailable: the storage fails, so that nothing is known of a picture.
        """
        for i in range(len(self)):
            position = (index + i) % len(self)
            picture = self._try(position)
            if picture is not None:
                return picture
            skipped[str(self.paths[position])] = self.unreadable[position]
        raise UserError(f"none of the {len(self)} pictures can be read; the first: {next(iter(skipped.items()))}")

    def _try(self, position: int) -> Tensor | None:
        if position in self.unreadable:
            return None
        if self.kept is not None and position in self.kept:
            return self.kept[position]
        path = self.paths[position]
        try:
            picture = PictureFiles([path], self.side)[0]
        except UnreadablePicture as error:
            self.unreadable[position] = str(error).removeprefix(f"{path}: ")
            return None
        if self.kept is not None:
            self.kept[position] = picture
        return picture


class StepBatches(Dataset):
    """This rank's share of the batch of every step; index = step.

    Sample s of step t is number t * global_batch + s of an endless sequence of shuffled epochs, mirrored or not by a
    draw of its own. Rank r of n takes the r-th n-th part of the batch.
    """

    def __init__(
        self,
        pictures: ReadablePictures,
        seed: int,
        global_batch: int,
        rank: int,
        world_size: int,
        horizontal_flip: bool,
    ) -> None:
        self.pictures = pictures
        self.seed = seed
        self.global_batch = global_batch
        self.samples = range(global_batch)[rank * global_batch // world_size : (rank + 1) * global_batch // world_size]
        self.horizontal_flip = horizontal_flip

    def __getitem__(self, step: int) -> Batch:
        skipped: dict[str, str] = {}
        pictures = [self._sample(step * self.global_batch + sample, skipped) for sample in self.samples]
        return Batch(normalize(torch.stack(pictures)), skipped)

    def _sample(self, number: int, skipped: dict[str, str]) -> Tensor:
        epoch, position = divmod(number, len(self.pictures))
        picture = self.pictures.read(int(epoch_order(self.seed, epoch, len(self.pictures))[position]), skipped)
        mirrored = self.horizontal_flip and np.random.default_rng((self.seed, 1, number)).random() < 0.5
        return picture.flip(-1) if mirrored else picture

    def from_step(self, first_step: int, num_steps: int, num_workers: int) -> Generator[Batch, None, None]:
        """Batches of steps first_step … num_steps - 1.

        Raises:
            UserError: as `ReadablePictures.read`.
        """
        steps = range(first_step, num_steps)
        loader = DataLoader(
            self, batch_size=None, sampler=steps, num_workers=num_workers, worker_init_fn=leave_sigterm_to_the_rank
        )
        batches = iter(loader)
        for _ in steps:
            yield next_batch(batches)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The shuffled order of one epoch; (length,) int64."""
    return np.random.default_rng((seed, 0, epoch)).permutation(length)
