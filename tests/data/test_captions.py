"""Which named caption a step takes."""

from collections import Counter

import pytest

from star_dist.data import captions
from star_dist.data.batches import drop_captions
from star_dist.data.captions import choose_caption
from star_dist.train import token_dropping

NAMES = ("original", "recaptioned", "tags")


def drawn(weights: dict[str, float], available: tuple[str, ...] = NAMES, count: int = 3000, **place: int) -> list[str]:
    place = {"seed": 1, "step": 5} | place
    return [choose_caption(available, weights, sample_id=i, **place) for i in range(count)]


def test_without_weights_the_first_is_taken() -> None:
    assert set(drawn({})) == {"original"}


def test_captions_are_drawn_by_weight_from_seed_step_and_sample_alone() -> None:
    weights = {"original": 1.0, "recaptioned": 4.0}
    once = drawn(weights)
    assert drawn(weights) == drawn(dict(reversed(weights.items()))) == once
    shares = Counter(once)
    assert abs(shares["recaptioned"] / 3000 - 0.8) < 0.03 and shares["tags"] == 0
    assert drawn(weights, step=6) != once and drawn(weights, seed=2) != once


def test_an_absent_caption_leaves_its_share_to_the_others() -> None:
    shares = Counter(drawn({"original": 1.0, "recaptioned": 8.0, "tags": 3.0}, available=("original", "tags")))
    assert abs(shares["tags"] / 3000 - 0.75) < 0.03 and shares["original"] + shares["tags"] == 3000
    with pytest.raises(KeyError, match="sample 0 has captions"):
        drawn({"recaptioned": 1.0}, available=("original",))


def test_which_caption_is_taken_and_whether_it_is_dropped_are_drawn_apart() -> None:
    names = drawn({"original": 1.0, "recaptioned": 4.0})
    dropped = drop_captions(range(3000), seed=1, step=5, rate=0.2)
    shares = Counter(name for name, drop in zip(names, dropped) if drop)
    assert abs(shares["recaptioned"] / sum(dropped) - 0.8) < 0.06
    assert captions.DRAW != token_dropping.DRAW  # seeded with (seed, step, sample), too
