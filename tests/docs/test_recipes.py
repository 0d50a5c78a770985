"""The commands of docs/recipes.md have settings that exist, and the study tries optimizers that exist."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from apps.training import optimizers
from apps.training.config import parse
from benchmarks import recipes

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(
    r"^```\w+\n(.*?)^```", (ROOT / "docs/recipes.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words[1:3]) for words in COMMANDS])
def test_a_command_parses(words: list[str]) -> None:
    python, script, *settings = words
    assert python == "python"
    if script.startswith("apps/"):
        assert parse(settings).command in ("compile", "run")
        return
    own = import_module(f"benchmarks.{Path(script).stem}").OWN
    assert parse(["command=compile", *(each for each in settings if each.split("=")[0] not in own)])


def test_every_optimizer_is_tried_at_three_rates_or_more_with_settings_it_has() -> None:
    assert {recipe.split(",")[0] for recipe in recipes.RECIPES} == set(optimizers.available())
    for recipe, (rates, settings) in recipes.RECIPES.items():
        assert len(set(map(float, rates))) == len(rates) >= 3
        for rate in rates:
            given = [f"optimizer={recipe.split(',')[0]}", f"optimizer.lr={rate}", *settings]
            assert parse(["command=run", *given]).optimizer.settings.lr == float(rate)


def test_the_table_puts_the_lowest_loss_first_and_marks_a_best_rate_at_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {
        "adamw": {"3e-4": 3.0, "1e-3": 2.5, "3e-3": 2.75},
        "muon": {"0.003": 2.6, "0.01": 2.25, "0.03": float("inf")},
    }
    losses["lion"] = {"1e-4": 2.125, "3e-4": 3.0, "1e-3": 4.0}

    def tries(study: recipes.Study, model: str, recipe: str) -> list[recipes.Try]:
        class Made(recipes.Try):
            @property
            def loss(self) -> float:
                return losses[recipe][self.rate]

        return [Made(rate, None) for rate in losses.get(recipe, {})]

    monkeypatch.setattr(recipes.Study, "tries", tries)
    study = recipes.Study(recipes.OWN, [])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in recipes.table(study, "demo").splitlines()[2:]]
    assert rows == [
        ["lion", "1e-4*", "2.125", "-0.375", "1e-4: 2.125, 3e-4: 3.000, 1e-3: 4.000"],
        ["muon", "0.01", "2.250", "-0.250", "0.003: 2.600, 0.01: 2.250, 0.03: –"],
        ["adamw", "1e-3", "2.500", "+0.000", "3e-4: 3.000, 1e-3: 2.500, 3e-3: 2.750"],
    ]
