"""Parquet files in Hugging Face's layout: a column of pictures, {bytes, path} or plain bytes, beside their captions.

Where a picture has a path and no bytes, the path is taken from the Parquet file's own folder. Units are files; those on
S3 are copied to a temporary file first. A picture's key is the value of `key_column`, or the file's path and the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.sources import DamagedUnit, Description, FileOptions, FileSource, SourceItem
from star_dist.config import StorageSection
from star_dist.errors import UserError, first_line

ROWS_AT_ONCE = 64  # pictures held in memory


class ParquetOptions(FileOptions):
    """image_column: the pictures. key_column: a column that is unique in the whole source; null counts rows.

    A row that has nothing in its key_column is left out.
    """

    image_column: str = "image"
    key_column: str | None = None


class Source(FileSource):
    """All .parquet files under a folder or prefix; see the module.

    Raises:
        UserError: there are none, pyarrow is not installed, or (from `open`) a damaged file or a missing column.
    """

    Options = ParquetOptions
    suffix = ".parquet"

    def __init__(self, options: ParquetOptions, storage: StorageSection, score_names: Sequence[str]) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError("pyarrow is not installed, which Parquet needs: pip install -e '.[prep]'") from None
        super().__init__(options, storage, score_names)

    def open_file(self, unit: str, recaptions: Mapping[str, Mapping[str, str]]) -> _ParquetFile:
        with self.local_copy(unit) as path:
            return _ParquetFile(self, unit, path, recaptions)


class _ParquetFile:
    """Rows of one file, read a few at a time."""

    def __init__(self, source: Source, unit: str, path: Path, recaptions: Mapping[str, Mapping[str, str]]) -> None:
        import pyarrow
        import pyarrow.parquet

        self.source, self.unit, self.recaptions = source, unit, recaptions
        options = source.options
        self.place = place = f"{options.path}/{unit}"
        try:
            self.file = pyarrow.parquet.ParquetFile(pyarrow.OSFile(str(path)))
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damage("is no whole Parquet file", error) from None
        wanted = [options.image_column, *options.captions.values(), *source.score_names]
        self.columns = list(dict.fromkeys(wanted + ([options.key_column] if options.key_column else [])))
        present = self.file.schema_arrow.names
        if missing := [column for column in self.columns if column not in present]:
            raise UserError(
                f"{place} has no column {', '.join(map(repr, missing))}; it has {present}; change "
                f"source (image_column, key_column, captions) or min_scores"
            )
        kind = self.file.schema_arrow.field(options.image_column).type
        is_bytes = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
        if not is_bytes and not pyarrow.types.is_struct(kind):
            raise UserError(
                f"{place}: column {options.image_column!r} is {kind}, expected bytes or a struct of bytes and path; "
                f"change source.image_column"
            )

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def __iter__(self) -> Iterator[SourceItem]:
        row = 0
        try:
            for fields in self._rows(self.columns):
                key = self._key(fields, row)
                picture = fields.pop(self.source.options.image_column)
                yield SourceItem(key, partial(self._describe, key, picture, fields), partial(self._read, picture))
                row += 1
        except DamagedUnit as error:
            yield from self.source.without_damaged(error, map(self._row_key, range(row, len(self))))

    def keys(self) -> Iterator[str]:
        key_column = self.source.options.key_column
        if key_column is None:
            return map(self._row_key, range(len(self)))
        return (self._key(fields, row) for row, fields in enumerate(self._rows([key_column])))

    def _key(self, fields: Mapping[str, Any], row: int) -> str:
        value = fields.get(self.source.options.key_column)
        return self._row_key(row) if value is None else str(value)

    def _row_key(self, row: int) -> str:
        return f"{self.unit}/{row:08}"

    def _rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Raises DamagedUnit at pages that are damaged."""
        import pyarrow

        try:
            for group in range(self.file.num_row_groups):  # one by one: damage in one leaves those before it alone
                for batch in self.file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                    try:
                        yield from batch.to_pylist()
                    except UnicodeDecodeError:  # pyarrow does not check text when it reads
                        yield from (self._row(batch, i) for i in range(batch.num_rows))
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damage("is damaged", error) from None

    def _damage(self, found: str, error: Exception) -> UserError:
        """What an error of the library means: a fault of the content, or of the storage, which has a number."""
        if isinstance(error, OSError) and error.errno is not None:
            return UserError(f"cannot read {self.place}: {error.strerror}; run the same command again")
        return DamagedUnit(self.place, "damaged Parquet file", f"{found} ({first_line(error)})")

    @staticmethod
    def _row(batch: Any, row: int) -> dict[str, Any]:
        """One row of a batch in which some text is not UTF-8; that text is read with surrogates in its place."""
        import pyarrow

        fields = {}
        for name in batch.schema.names:
            value = batch.column(name)[row]
            try:
                fields[name] = value.as_py()
            except UnicodeDecodeError:
                if pyarrow.types.is_string(value.type) or pyarrow.types.is_large_string(value.type):
                    fields[name] = value.cast(pyarrow.large_binary()).as_py().decode("utf-8", "surrogateescape")
                else:  # the path in a picture's struct
                    fields[name] = None
        return fields

    def _describe(self, key: str, picture: Any, fields: dict[str, Any]) -> Description:
        if picture is None or (isinstance(picture, dict) and not (picture.get("bytes") or picture.get("path"))):
            return Description(problem="no picture in the row", has_picture=False)
        key_column = self.source.options.key_column
        if key_column is not None and fields.get(key_column) is None:
            return Description(problem="no key in the row", has_picture=False)
        recaptions = {name: texts[key] for name, texts in self.recaptions.items() if key in texts}
        return self.source.description(fields, recaptions)

    def _read(self, picture: Any) -> bytes:
        if isinstance(picture, bytes):
            return picture
        if picture.get("bytes"):
            return picture["bytes"]
        path = PurePosixPath(picture["path"])
        if path.is_absolute() or ".." in path.parts or "\0" in str(path):
            raise FileNotFoundError(2, "path outside of the source", str(path))
        return self.source.read_file(str(PurePosixPath(self.unit).parent / path))
