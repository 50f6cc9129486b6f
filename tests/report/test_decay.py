"""A run that makes its student worse says so, and knows its best evaluation."""

from __future__ import annotations

import pytest

from sidcli.report.decay import Best, best, worsening


def records(values: list[float], width: float = 0.1, **looks: float) -> dict[float, dict[str, float]]:
    """Evaluations at steps 50, 100, ... with intervals of this half width."""
    return {
        50.0 * (1 + index): {"proxy_cmmd": value, "proxy_cmmd_low": value - width, "proxy_cmmd_high": value + width}
        | {f"proxy_{name}": look for name, look in looks.items()}
        for index, value in enumerate(values)
    }


def test_the_best_evaluation_is_the_lowest_and_the_first_of_equal_ones_and_not_the_untrained_start() -> None:
    assert best(records([3.0, 1.0, 1.0, 2.0])) == Best(100, 1.0, 1.1)
    assert best({0.0: {"proxy_cmmd": 0.1}, 10.0: {"ratio": 1.0}} | records([3.0])) == Best(50, 3.0, 3.1)
    assert best({0.0: {"proxy_cmmd": 0.1}}) is None and best({}) is None


def test_a_student_that_is_worse_than_its_untrained_start_is_noticed_too() -> None:
    said = worsening({0.0: {"proxy_cmmd": 1.0}} | records([3.0, 3.0, 3.0]))
    assert said is not None and "since step 0" in said


def test_three_evaluations_in_a_row_beyond_the_interval_of_the_best_are_a_warning_that_names_the_looks() -> None:
    said = worsening(records([3.0, 1.0, 1.5, 1.6, 1.7], saturation=2.0, contrast=1.1, diversity=0.25))
    assert said == (
        "the student has been getting worse since step 100: CMMD to the teacher 1.0000 there, 1.7000 at step 250, "
        "saturation 2.00 times the teacher's, diversity at one prompt 0.25 times the teacher's"
    )


@pytest.mark.parametrize(
    "values",
    [
        [3.0, 2.0, 1.0, 0.9, 0.8],  # gets better
        [1.0, 1.5, 1.6],  # two are not enough
        [1.0, 1.5, 1.15, 1.6],  # one of the last three overlaps the best
        [3.0, 4.0, 5.0, 1.0],  # the best is the last
        [],
    ],
)
def test_a_run_that_gets_better_or_only_fluctuates_is_left_alone(values: list[float]) -> None:
    assert worsening(records(values)) is None


def test_records_of_versions_without_intervals_are_compared_by_their_values() -> None:
    plain = {step: {"proxy_cmmd": numbers["proxy_cmmd"]} for step, numbers in records([1.0, 2.0, 2.0, 2.0]).items()}
    assert worsening(plain) is not None and worsening(records([1.0, 2.0, 2.0, 2.0], width=0.6)) is None
