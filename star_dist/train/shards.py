"""The files of a checkpoint: fp32 weights and Adam moments by parameter, in one safetensors file per rank.

Every rank writes the flat ranges of parameters that it owns, as `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`,
(numel of its range,) float32 each. `index.json` says which file holds which range of which parameter, so any number of
ranks, at any ZeRO stage, can read the slices that they own, and an export needs no DeepSpeed. The files' metadata has a
CRC-32 of every block of a range, so that whoever reads a part of it can tell whether it is what was written.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from star_dist.errors import Unavailable, UserError
from star_dist.files import FULL_DISK
from star_dist.train.checkpoint import CHOOSING, INDEX, Checkpoint, shard_name
from star_dist.train.places import Place
from star_dist.weights import writing

KINDS = ("weight", "exp_avg", "exp_avg_sq")
FORMAT = 1
CHECKSUMS = "crc32"  # in the metadata of a file: tensor name -> of each of its blocks, as JSON
BLOCK = 4 * 2**20  # float32 values, 16 MiB
ADVICE = f"take another one ({CHOOSING})"


@dataclass(frozen=True)
class Piece:
    """The flat range start..stop of one parameter."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Scalars:
    """What a checkpoint holds beside tensors. optimizer_steps: Adam's count of updates; the others: the engine's.

    groups: the settings of each parameter group, but for the rate, which follows from the step. group_of: parameter ->
    name of its group.
    """

    optimizer_steps: int
    global_steps: int
    skipped_steps: int
    groups: dict[str, dict[str, Any]]
    group_of: dict[str, str]


def write_shard(place: Place, folder: str, rank: int, tensors: dict[str, Tensor]) -> None:
    """Writes this rank's tensors (`KIND/NAME` -> flat range).

    Raises:
        OSError: it cannot be written.
    """
    checksums = {name: _checksums(values) for name, values in tensors.items()}
    with place.writing(folder, shard_name(rank)) as path, writing(path):
        save_file(tensors, path, {CHECKSUMS: json.dumps(checksums)})


def write_index(
    place: Place, folder: str, shapes: dict[str, list[int]], pieces: Sequence[Sequence[Piece]], scalars: Scalars
) -> None:
    """Writes the index; `pieces` are those of every rank.

    Raises:
        OSError: it cannot be written.
    """
    parameters: dict[str, Any] = {name: {"shape": shape, "pieces": []} for name, shape in shapes.items()}
    for rank, owned in enumerate(pieces):
        for piece in owned:
            parameters[piece.name]["pieces"].append([rank, piece.start, piece.stop])
    index = {"format": FORMAT, "scalars": vars(scalars), "parameters": parameters}
    with place.writing(folder, INDEX) as path:
        path.write_text(json.dumps(index))


class ShardReader:
    """Reads slices of a checkpoint's parameters.

    Raises:
        UserError: the checkpoint is of another format, or a file cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        with self._explained():
            with checkpoint.place.reading(checkpoint.folder, INDEX) as path:
                index = json.loads(path.read_text())
            if index["format"] != FORMAT:
                raise UserError(f"checkpoint {checkpoint.path} has format {index['format']}, this code reads {FORMAT}")
            self.scalars = Scalars(**index["scalars"])
            self.parameters: dict[str, Any] = index["parameters"]

    def check_parameters(self, shapes: dict[str, list[int]]) -> None:
        """Compares the checkpoint's parameters with a model's.

        Raises:
            UserError: they differ in name or shape.
        """
        found = {name: entry["shape"] for name, entry in self.parameters.items()}
        if found != shapes:
            names = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
            raise UserError(
                f"checkpoint {self.checkpoint.path} holds other parameters than the model: {names[0]} is "
                f"{found.get(names[0])} there and {shapes.get(names[0])} here ({len(names)} differ)"
            )

    def read_into(self, targets: Iterable[tuple[str, Piece, Tensor]]) -> None:
        """Fills tensors, (stop - start,) each, of any device and precision, with ranges of parameters by kind.

        One file after another, so that those of a checkpoint on S3 are on the local disk one at a time.
        """
        slices: dict[int, list[tuple[str, int, int, Tensor]]] = {}
        for kind, piece, target in targets:
            covered = 0
            for rank, start, stop in self.parameters[piece.name]["pieces"]:
                first, last = max(start, piece.start), min(stop, piece.stop)
                if first < last:
                    part = target[first - piece.start : last - piece.start]
                    slices.setdefault(rank, []).append((f"{kind}/{piece.name}", first - start, last - start, part))
                    covered += last - first
            if covered != piece.stop - piece.start:
                raise UserError(
                    f"checkpoint {self.checkpoint.path} is damaged: its index has {covered} of the "
                    f"{piece.stop - piece.start} values {piece.start}..{piece.stop} of {piece.name}"
                )
        place, folder = self.checkpoint.place, self.checkpoint.folder
        for rank, parts in slices.items():
            name = shard_name(rank)
            with self._explained(), place.reading(folder, name) as path, safe_open(path, framework="pt") as file:
                checksums = json.loads((file.metadata() or {}).get(CHECKSUMS, "{}"))  # none before 2026-11-28
                for tensor, start, stop, part in parts:
                    part.copy_(self._read_checked(file, name, tensor, start, stop, checksums.get(tensor)))

    def weights(self) -> dict[str, Tensor]:
        """All weights, whole, float32, by name."""
        weights = {name: torch.empty(entry["shape"]) for name, entry in self.parameters.items()}
        self.read_into(("weight", Piece(name, 0, whole.numel()), whole.view(-1)) for name, whole in weights.items())
        return weights

    def _read_checked(
        self, file: Any, file_name: str, tensor: str, start: int, stop: int, checksums: list[int] | None
    ) -> Tensor:
        """The range start..stop of a file's tensor; reads the whole of all blocks that it touches."""
        stored = file.get_slice(tensor)
        first, last = start // BLOCK, math.ceil(stop / BLOCK)
        begin = first * BLOCK
        values = stored[begin : min(last * BLOCK, *stored.get_shape())]
        if checksums is not None and _checksums(values) != checksums[first:last]:
            raise UserError(
                f"checkpoint {self.checkpoint.path} is damaged: {tensor} in {file_name} is not what was written "
                f"there (CRC-32); {ADVICE}"
            )
        return values[start - begin : stop - begin]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            full = isinstance(error, OSError) and error.errno in FULL_DISK
            advice = f"make room in {tempfile.gettempdir()}, or set TMPDIR" if full else ADVICE
            kind = Unavailable if isinstance(error, OSError) else UserError
            raise kind(
                f"checkpoint {self.checkpoint.path} cannot be read: {type(error).__name__}: {error}; {advice}"
            ) from None


def _checksums(values: Tensor) -> list[int]:
    """CRC-32 of every block of a flat tensor."""
    return [zlib.crc32(block.numpy()) for block in values.split(BLOCK)]
