"""Taking a run folder, and differences between what a run or a job was begun with and what it is now."""

from __future__ import annotations

import errno
import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from star_dist.errors import Unavailable, UserError
from star_dist.run_folder import claim_run_folder, differences


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, [("a.c", 2, 3)]),
        ({"a": {"b": {"x": 1}}}, {"a": {"b": {}}}, [("a.b", {"x": 1}, {})]),
        ({"a": {"b": 1}}, {}, [("a.b", 1, None)]),
        ({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}, [("a.1.b", 2, 3)]),
        ({"a": 0, "b": [1, 2]}, {"a": {"x": 1}, "b": [1, 2]}, [("a", 0, {"x": 1})]),
        ({"a": None}, {}, []),
    ],
)
def test_differences(before: dict[str, Any], now: dict[str, Any], expected: list[tuple[str, Any, Any]]) -> None:
    assert list(differences(before, now)) == expected


def test_a_folder_that_is_taken_or_lost_may_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = pytest.raises(Unavailable, match="another training is running in")
    with claim_run_folder(tmp_path), get_context("fork").Pool(1) as other, taken:  # no process locks itself out
        other.apply(claim_run_folder, [tmp_path])
    for code, kind in ((errno.ESTALE, Unavailable), (errno.EACCES, UserError)):

        def fail(*_: Any, code: int = code, **__: Any) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(Path, "mkdir", fail)
        with pytest.raises(UserError, match=os.strerror(code)) as raised:
            claim_run_folder(tmp_path)
        assert raised.type is kind
