"""Sources of captioned pictures, one module per kind; `open_source` picks one by its description in a config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from star_dist.errors import UserError


@dataclass(frozen=True)
class SourceItem:
    """One captioned picture that is not read yet.

    key: unique in its source and the same in every run. read: the file's bytes; raises OSError where they are missing.
    """

    key: str
    caption: str
    read: Callable[[], bytes]


class Source(Protocol):
    """Captioned pictures in an order that is the same in every run."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[SourceItem]: ...


def open_source(description: Mapping[str, Any]) -> Source:
    """The source that `{"kind": …, …}` describes; the other keys are the arguments of that kind.

    Raises:
        UserError: an unknown kind, or arguments that the kind does not take.
    """
    from data_prep.sources.folder import FolderSource

    kinds = {"folder": FolderSource}
    arguments = dict(description)
    kind = arguments.pop("kind", None)
    if kind not in kinds:
        raise UserError(f"source.kind is {kind!r}; known kinds: {', '.join(sorted(kinds))}")
    if set(arguments) != {"path"}:
        raise UserError(f"a source of kind {kind!r} takes exactly 'path' besides 'kind', got {sorted(arguments)}")
    return kinds[kind](arguments["path"])
