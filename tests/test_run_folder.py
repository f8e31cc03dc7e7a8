"""Differences between what a run or a job was begun with and what it is now."""

from __future__ import annotations

from typing import Any

import pytest

from star_dist.run_folder import differences


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
