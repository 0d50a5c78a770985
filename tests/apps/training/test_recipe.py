"""What a run's settings make of rates and clipping."""

from apps.training.config import parse
from apps.training.optimizer_groups import DEFAULT
from apps.training.parameter_groups import group_parameters
from apps.training.recipe import make_recipe


def test_the_recipe_follows_the_settings() -> None:
    given = ["optimizer.lr=0.5", "schedule=linear", "schedule.warmup_steps=2", "training.max_grad_norm=3"]
    config = parse(["command=run", *given])
    groups = group_parameters(config.optimizer, {"weight": ((2, 2), "matrix")})
    made = make_recipe(config, groups, total_steps=4)
    assert made.groups is groups
    assert [(group.match, group.settings.lr) for group in groups] == [(DEFAULT, 0.5)]
    assert (made.peak, made.max_grad_norm) == (0.5, 3.0)
    assert [made.rate(step, 0.5) for step in (1, 2)] == [0.25, 0.5]
    assert [made.rate(step, 8.0) for step in (1, 2)] == [4.0, 8.0]
