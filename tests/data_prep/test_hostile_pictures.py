"""Two thousand hostile pictures: every one is either in the data set or in rejects.jsonl, and the job ends well."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.partition import Partition
from data_prep.tokenization import tokenize, tokenize_partition
from star_dist.config import PrepConfig, parse_config
from tests.data_prep.hostile import KINDS, make_hostile_folder
from tests.data_prep.jobs import samples

COUNT = 2000


@pytest.mark.slow
def test_all_of_them_are_accounted_for(
    tmp_path: Path, prep_values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sum(share for _, share, _ in KINDS.values()) == 100
    (tmp_path / "pictures").mkdir()
    expected = make_hostile_folder(tmp_path / "pictures", COUNT)
    source = {"kind": "folder", "path": str(tmp_path / "pictures")}
    values = prep_values | {"source": source, "output": str(tmp_path / "set"), "min_side": 10, "max_aspect": 10.0}
    values["min_scores"] = {"score": 0.0}
    config = parse_config(PrepConfig, values)
    summary = tokenize_partition(config, Partition(), workers=4)
    tokenize(config)

    rejects = [json.loads(line) for line in (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()]
    reasons = {reject["key"]: reject["reason"] for reject in rejects}
    kept = samples(tmp_path / "set", "train") | samples(tmp_path / "set", "val")
    assert len(reasons) == len(rejects) and not reasons.keys() & kept.keys()
    assert reasons.keys() | kept.keys() == expected.keys() and len(expected) == COUNT
    wrong = {key: reasons.get(key) for key, may_be in expected.items() if reasons.get(key) not in may_be}
    assert not wrong
    assert summary.read == COUNT and summary.kept == len(kept) > 700
    assert summary.rejected == dict(sorted(Counter(reasons.values()).items()))
    said = capsys.readouterr().out
    assert f"read {COUNT}, kept {len(kept)}, rejected {len(rejects)} (" in said and "pictures/s" in said
