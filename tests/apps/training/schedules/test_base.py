"""What every schedule keeps: a first step above 0, no jumps, rising, flat and falling parts, no memory, any total."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training import schedules
from apps.training.config import parse
from apps.training.config_schema import TrainingConfig
from apps.training.recipe import make_recipe
from apps.training.schedules._base import Schedule
from apps.training.steps import count_steps

NAMES = schedules.available()
NUMBERS = st.fixed_dictionaries(
    {
        "warmup_steps": st.integers(0, 30),
        "flat_steps": st.integers(0, 30),
        "decay_steps": st.none() | st.integers(0, 60),
        "start_steps": st.integers(0, 60),
        "final_ratio": st.floats(0, 1),
    }
)


def config_of(schedule: type[Schedule], numbers: dict[str, Any]) -> Any:
    fields = schedule.Config.__dataclass_fields__
    return schedule.Config(**{name: value for name, value in numbers.items() if name in fields})


def rates(name: str, total: int, lr: float, numbers: dict[str, Any]) -> list[float]:
    schedule = schedules.load(name)
    config = config_of(schedule, numbers)
    return [schedule.learning_rate(step, total, lr, config) for step in range(1, total + 1)]


@pytest.mark.parametrize("name", NAMES)
@given(total=st.integers(1, 60), numbers=NUMBERS)
def test_it_rises_to_the_peak_and_never_again(name: str, total: int, numbers: dict[str, Any]) -> None:
    found = rates(name, total, 1.0, numbers)
    warm, rest = found[: numbers["warmup_steps"]], found[numbers["warmup_steps"] :]
    assert found[0] > 0
    assert all(early < late for early, late in itertools.pairwise(warm))
    assert all(early >= late for early, late in itertools.pairwise(rest))
    assert rest[:1] in ([], [1.0]) or warm[-1:] == [1.0]
    lowest = numbers["final_ratio"] if "final_ratio" in schedules.load(name).Config.__dataclass_fields__ else 1.0
    assert all(lowest - 1e-12 <= rate <= 1.0 for rate in rest)
    # even a decay to 0 has a last step that does something
    assert found[-1] > 0


@pytest.mark.parametrize("name", NAMES)
@given(total=st.integers(2, 60), numbers=NUMBERS)
def test_it_has_no_jumps(name: str, total: int, numbers: dict[str, Any]) -> None:
    """No two neighbours are further apart than the curve's slope allows; a cosine's steepest is π/2 times its chord."""
    found = rates(name, total, 1.0, numbers)
    warm = max(numbers["warmup_steps"], 1)
    starts = {
        "constant": total,
        "cosine": warm,
        "linear": warm + numbers["flat_steps"],
        "piecewise_linear": max(warm, numbers["start_steps"]),
        "trapezoid": max(warm, total - (total // 5 if numbers["decay_steps"] is None else numbers["decay_steps"])),
    }
    steepest = math.pi / 2 / max(total + 1 - starts[name], 1)
    for step, (early, late) in enumerate(itertools.pairwise(found), start=2):
        assert abs(late - early) <= (1 / warm if step <= warm else steepest) + 1e-12


@pytest.mark.parametrize("name", NAMES)
@given(total=st.integers(1, 40), numbers=NUMBERS, lr=st.floats(1e-6, 10))
def test_the_curve_is_the_same_for_every_peak(name: str, total: int, numbers: dict[str, Any], lr: float) -> None:
    """Groups with a rate of their own keep their proportions."""
    shares = rates(name, total, 1.0, numbers)
    assert rates(name, total, lr, numbers) == pytest.approx([lr * share for share in shares], rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_epochs_steps_and_a_token_budget_of_one_length_give_one_curve(name: str) -> None:
    config = parse(["command=run", f"schedule={name}", "schedule.warmup_steps=3", "optimizer.lr=3e-3"])

    def curve(**length: Any) -> list[float]:
        count = count_steps(10, TrainingConfig(**length), tokens_per_step=64, sizes={"N": 1600})
        recipe = make_recipe(config, [], count.total)
        return [recipe.rate(step, recipe.peak) for step in range(1, count.total + 1)]

    whole = curve(num_epochs=2)
    assert len(whole) == 20
    assert whole == curve(max_steps=20) == curve(token_budget="1217") == curve(token_budget="N*80/100")
    assert whole[0] == pytest.approx(1e-3)
