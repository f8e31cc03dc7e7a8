import pytest

from star_dist.learning_rate import learning_rate_fraction


def test_cosine_rises_then_falls_to_its_final_fraction() -> None:
    fractions = [learning_rate_fraction(step, 102, 2, "cosine", 0.1) for step in range(103)]
    assert fractions[:3] == [0.5, 1.0, 1.0]
    assert fractions[52] == pytest.approx(0.55)
    assert fractions[102] == pytest.approx(0.1)
    assert fractions[2:] == sorted(fractions[2:], reverse=True)


def test_linear_and_constant() -> None:
    assert [learning_rate_fraction(step, 10, 0, "linear", 0.5) for step in (0, 5, 10)] == pytest.approx([1, 0.75, 0.5])
    assert [learning_rate_fraction(step, 10, 4, "constant", 0.5) for step in (0, 3, 9)] == [0.25, 1.0, 1.0]
