import pytest

from star_dist.scales import ScaleSchedule

SCHEDULES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


@pytest.mark.parametrize(
    ("resolution", "tokens", "visible"), [(256, 680, 0.619), (512, 2240, 0.652), (1024, 9451, 0.638)]
)
def test_published_schedules(resolution: int, tokens: int, visible: float) -> None:
    schedule = ScaleSchedule(SCHEDULES[resolution])
    assert schedule.num_tokens == tokens
    assert schedule.visible_pairs / tokens**2 == pytest.approx(visible, abs=5e-4)
    assert schedule.resolution(16) == resolution
    assert schedule.starts[1:] == schedule.ends[:-1]


def test_visible_pairs_counts_what_the_mask_shows() -> None:
    from star_dist.model.kernels.reference import block_causal_mask

    schedule = ScaleSchedule((1, 2, 5))
    assert schedule.visible_pairs == int(block_causal_mask(schedule, "cpu").sum())


@pytest.mark.parametrize(("sides", "said"), [((2, 3), "start with 1"), ((1, 3, 3), "3 followed by 3"), ((), "start")])
def test_impossible_schedules_are_refused(sides: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ScaleSchedule(sides)


def test_every_scale_keeps_a_token() -> None:
    assert ScaleSchedule((1, 2, 3)).keeping(0.01, 2).lengths == (1, 1, 1)
