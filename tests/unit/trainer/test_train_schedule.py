"""The learning rate over a run."""

import pytest
from finetune_api.spec import Schedule
from finetune_trainer.train.schedule import learning_rate


def rates(total: int, warmup: float, schedule: Schedule) -> list[float]:
    return [learning_rate(step, total, 2.0, warmup, schedule) for step in range(total)]


@pytest.mark.parametrize("schedule", Schedule)
def test_it_rises_to_its_peak_first(schedule: Schedule) -> None:
    assert rates(20, 0.2, schedule)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_linear_falls_in_equal_parts_and_never_wastes_a_step_at_0() -> None:
    assert rates(4, 0, Schedule.LINEAR) == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_cosine_is_at_half_its_peak_half_way() -> None:
    values = rates(10, 0, Schedule.COSINE)
    assert values[5] == pytest.approx(1.0)
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] < 0.1


def test_constant_stays() -> None:
    assert rates(5, 0.2, Schedule.CONSTANT) == [2.0] * 5


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_a_run_of_one_step_learns(schedule: Schedule, warmup: float) -> None:
    assert rates(1, warmup, schedule) == [2.0]
