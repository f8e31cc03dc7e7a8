"""Shards that stay open between their samples.

mosaicml-streaming opens, seeks, reads twice and closes a shard's file for every sample. Samples of this project are a
few kilobytes, so those calls were most of a loader worker's time; a shard that stays open takes one `pread`.
"""

from __future__ import annotations

import os

import numpy as np
from streaming.base.format.mds import MDSReader

MOST_OPEN = 64  # files per process, far below the usual limit of 1,024


class OpenShard(MDSReader):
    """A reader of the library, taken over, whose file is opened at its first sample.

    The `MOST_OPEN` last used of a process stay open. Whenever one is opened, those are closed that the cache has
    evicted, so that their room on the disk is given back.
    """

    _open: dict[OpenShard, None] = {}  # of this process, the last used at the end

    def __init__(self, reader: MDSReader) -> None:
        vars(self).update(vars(reader))
        self._descriptor: int | None = None

    def get_sample_data(self, idx: int) -> bytes:
        """The stored bytes of the shard's sample `idx`.

        Raises:
            FileNotFoundError: the file is not in the cache (the library fetches it then).
            IndexError: the file ends before the sample does.
        """
        if self._descriptor is None:
            self._open_file()
        else:
            del OpenShard._open[self]
        OpenShard._open[self] = None
        begin, end = (int(offset) for offset in self._offsets[idx : idx + 2])
        data = os.pread(self._descriptor, end - begin, begin)
        if len(data) != end - begin:
            raise IndexError(f"{self.raw_data.basename} ends within sample {idx}")
        return data

    def _open_file(self) -> None:
        descriptor = os.open(os.path.join(self.dirname, self.split, self.raw_data.basename), os.O_RDONLY)
        # The file begins with the number of samples and where each begins and ends, 4 bytes each.
        table = os.pread(descriptor, 4 * (self.samples + 1), 4)
        if len(table) != 4 * (self.samples + 1):
            os.close(descriptor)
            raise IndexError(f"{self.raw_data.basename} ends within its table of samples")
        self._offsets = np.frombuffer(table, "<u4")
        self._descriptor = descriptor
        for shard in list(OpenShard._open):
            if len(OpenShard._open) >= MOST_OPEN or os.fstat(shard._descriptor).st_nlink == 0:
                shard._close_file()

    def _close_file(self) -> None:
        del OpenShard._open[self]
        os.close(self._descriptor)
        self._descriptor = None
