"""Statistics of measured steps against sums written out in float64 beside the eager twin."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.training.eager_program import EagerProgram
from compiled.measuring import COLUMNS, Measuring
from compiled.reduction import OneWorker
from tests.compiled.conftest import Compile, Compiled

Table = dict[str, dict[str, float]]  # parameter → column → number


def by_name(names: Any, table: Tensor) -> Table:
    return {name: dict(zip(COLUMNS, row.tolist(), strict=True)) for name, row in zip(names, table, strict=True)}


class Reference:
    """The eager twin's own gradients and weights before and after each step, and every number from its definition."""

    def __init__(self, compiled: Compiled) -> None:
        self.model = compiled.model()
        self.twin = EagerProgram(self.model, precision=compiled.plan.precision)
        self.last: dict[str, tuple[Tensor, Tensor]] | None = None

    def step(self, batches: Any, hyper: Tensor, clip: float | None) -> Table:
        weights = self.twin.weights
        gradients = {name: each.double() for name, each in self.twin.gradients(batches).items()}
        before = {name: weight.detach().double().clone() for name, weight in weights.items()}
        self.twin.train_step(batches, hyper, clip)
        updates = {name: weight.detach().double() - before[name] for name, weight in weights.items()}
        table = {name: self._row(before[name], gradients[name], updates[name], *self._last(name)) for name in gradients}
        self.last = {name: (gradients[name], updates[name]) for name in gradients}
        return table

    def forget(self) -> None:
        self.last = None

    def _last(self, name: str) -> tuple[Tensor, Tensor]:
        return (torch.zeros(1), torch.zeros(1)) if self.last is None else self.last[name]

    @staticmethod
    def _row(weight: Tensor, gradient: Tensor, update: Tensor, last_g: Tensor, last_u: Tensor) -> dict[str, float]:
        row = {"nonfinite": 0.0}
        for kind, values in (("param", weight), ("grad", gradient), ("update", update)):
            flat = values.flatten().tolist()
            row[f"{kind}_l1"] = math.fsum(map(abs, flat))
            row[f"{kind}_square"] = math.fsum(x * x for x in flat)
            row[f"{kind}_max"] = max(map(abs, flat))
        row |= {
            "dot_last_grad": (gradient * last_g).sum().item(),
            "last_grad_square": (last_g * last_g).sum().item(),
            "dot_last_update": (gradient * last_u).sum().item(),
            "last_update_square": (last_u * last_u).sum().item(),
        }
        return row


def assert_close(ours: Table, theirs: Table, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, row in ours.items():
        assert row.keys() == theirs[name].keys()
        for column, number in row.items():
            scale = abs(theirs[name][column])
            if column.startswith("dot"):  # an inner product is exact beside the lengths of its two sides
                last = theirs[name][f"{column.removeprefix('dot_')}_square"]
                scale = math.sqrt(theirs[name]["grad_square"] * last)
            assert abs(number - theirs[name][column]) <= tolerance * max(scale, 1e-30), (name, column)


@pytest.mark.parametrize(("every", "clip", "microbatches"), [(1, None, 1), (1, 0.5, 2), (3, 0.5, 1)])
def test_every_number_is_its_definition_on_the_eager_twin(
    tiny: Compiled, every: int, clip: float | None, microbatches: int
) -> None:
    model, reference = tiny.model(), Reference(tiny)
    program = tiny.program(model, stats_every=every)
    for step in range(1, 8):
        batches = [tiny.batch(10 * step + index, 0.7, of=40) for index in range(microbatches)]
        hyper = tiny.hyperparameters(model, step)
        program.measuring.begin(step)
        program.train_step(batches, hyper, clip)
        expected = reference.step(batches, hyper, clip)
        assert program.measuring.measures == (step % every == 0)
        if step % every == 0:
            assert_close(by_name(program.measuring.names, program.measuring.table), expected, 1e-10)


def test_accuracy_is_the_weight_of_the_positions_whose_label_is_likeliest(tiny: Compiled) -> None:
    model = tiny.model()
    program = tiny.program(model, stats_every=1)
    batches = [tiny.batch(seed, 0.7, of=40) for seed in (1, 2)]
    for batch in batches:  # random labels are hardly ever right: every other one is made so
        with torch.no_grad():
            likeliest = model(input_ids=batch["input_ids"]).logits.argmax(-1)
        batch["labels"][:, ::2] = likeliest[:, ::2]
    with torch.no_grad():
        hits = [model(input_ids=batch["input_ids"]).logits.argmax(-1) == batch["labels"] for batch in batches]
    expected = sum((hit * batch["grad_scale"]).sum().item() for hit, batch in zip(hits, batches, strict=True))
    program.measuring.begin(1)
    program.train_step(batches, tiny.hyperparameters(model, 1), None)
    assert expected > 0.3
    assert program.measuring.accuracy.item() == pytest.approx(expected, rel=1e-12)


def test_measuring_changes_no_bit_of_the_training(tiny: Compiled) -> None:
    plain, watched = tiny.model(), tiny.model()
    without, program = tiny.program(plain), tiny.program(watched, stats_every=2)
    assert not without.measuring.measures
    for step in range(1, 6):
        program.measuring.begin(step)
        batches, hyper = [tiny.batch(step)], tiny.hyperparameters(plain, step)
        assert torch.equal(program.train_step(batches, hyper, 1.0).loss, without.train_step(batches, hyper, 1.0).loss)
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert without.optimizer_state().keys() <= program.optimizer_state().keys()


def test_bfloat16_weights_with_masters_are_measured_by_their_masters(compile_step: Compile) -> None:
    compiled = compile_step("model.dtype=bfloat16")
    model = compiled.model()
    program = compiled.program(model, stats_every=1)
    masters = {name: state["master"] for name, state in program.updater.state.items()}
    for step in (1, 2):
        before = {name: master.double().clone() for name, master in masters.items()}
        program.measuring.begin(step)
        program.train_step([compiled.batch(step)], compiled.hyperparameters(model, step), 1.0)
        table = by_name(program.measuring.names, program.measuring.table)
        for name, master in masters.items():
            update = master.double() - before[name]
            assert table[name]["update_l1"] == pytest.approx(update.abs().sum().item(), rel=1e-5)
            assert table[name]["update_max"] == pytest.approx(update.abs().max().item(), rel=1e-5)
            assert table[name]["param_square"] == pytest.approx(before[name].square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_measures_the_same_bits(tiny: Compiled, every: int) -> None:
    whole = tiny.model()
    program = tiny.program(whole, stats_every=every)
    results, saved = {}, {}
    for step in range(1, 7):
        program.measuring.begin(step)
        program.train_step([tiny.batch(step)], tiny.hyperparameters(whole, step), 1.0)
        results[step] = program.measuring.table.clone()
        state = {name: tensor.clone() for name, tensor in program.optimizer_state().items()}
        saved[step] = (state, {name: each.detach().clone() for name, each in whole.named_parameters()})
    for stop in (3, 4):
        model = tiny.model()
        state, weights = saved[stop]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        resumed = tiny.program(model, stats_every=every)
        resumed.load_optimizer_state(state)
        for step in range(stop + 1, 7):
            resumed.measuring.begin(step)
            resumed.train_step([tiny.batch(step)], tiny.hyperparameters(model, step), 1.0)
            if resumed.measuring.measures:
                assert torch.equal(resumed.measuring.table, results[step])


def some(values: list[float]) -> dict[str, Tensor]:
    return {"a": torch.tensor(values, dtype=torch.float64)}


def unit(values: list[float], every: int) -> Measuring:
    return Measuring(["a"], some(values), every, torch.device("cpu"))


def measured(measuring: Measuring, step: int, weight: list[float], gradient: list[float]) -> dict[str, float] | None:
    measuring.begin(step)
    measuring.start()
    measuring.weights["a"].copy_(some(weight)["a"])
    measuring.before_update(some(gradient))
    measuring.weights["a"].sub_(some(gradient)["a"])
    measuring.after_update(["a"])
    measuring.finish(OneWorker())
    return by_name(["a"], measuring.table)["a"] if measuring.measures else None


def test_numbers_that_are_not_finite_are_counted() -> None:
    row = measured(unit([0.0] * 4, 1), 1, [1.0] * 4, [math.nan, math.inf, -math.inf, 1.0])
    assert row["nonfinite"] == 3
    assert math.isnan(row["grad_l1"])
    assert row["param_l1"] == 4


def test_the_last_step_is_the_one_right_before_this_one_or_none() -> None:
    """A measured step that follows one whose numbers were not kept must not take older ones for the last."""
    measuring = unit([0.0, 0.0], 10)
    kept = {}
    for step in range(1, 11):
        row = measured(measuring, step, [1.0, 1.0], [float(step), 1.0])
        kept[step] = measuring.state()
    assert (row["dot_last_grad"], row["dot_last_update"]) == (9 * 10 + 1, -(9 * 10 + 1))
    assert [step for step, state in kept.items() if state] == [9, 10]
    shorter = unit([0.0, 0.0], 3)
    shorter.load_state({name: tensor.clone() for name, tensor in kept[10].items()})
    assert measured(shorter, 11, [1.0, 1.0], [1.0, 1.0]) is None
    assert measured(shorter, 12, [1.0, 1.0], [2.0, 1.0])["dot_last_grad"] == 1 * 2 + 1
    strange = unit([0.0, 0.0], 1)
    strange.load_state({})
    row = measured(strange, 13, [1.0, 1.0], [1.0, 1.0])
    assert (row["last_grad_square"], row["last_update_square"]) == (0, 0)
    late = unit([0.0, 0.0], 2)
    late.load_state({name: tensor.clone() for name, tensor in kept[10].items()})
    late.begin(21)  # keeps nothing of its own here: what was loaded is older
    late.begin(23)
    assert measured(late, 24, [1.0, 1.0], [1.0, 1.0]) is not None


def test_the_time_of_a_measured_step_goes_to_its_phases(tiny: Compiled) -> None:
    model = tiny.model()
    program = tiny.program(model, stats_every=1)
    for clip in (None, 1.0):
        program.measuring.begin(1)
        program.train_step([tiny.batch(1), tiny.batch(2)], tiny.hyperparameters(model, 1), clip)
        seconds = program.measuring.phases.seconds()
        assert set(seconds) == {"forward", "head", "accuracy", "backward", "reduce", "update", "statistics"}
        assert all(time > 0 for time in seconds.values())
        begins = [mark.at for mark in program.measuring.phases.marks]
        assert sum(seconds.values()) == pytest.approx(begins[-1] - begins[0])
        assert all(before <= after for before, after in itertools.pairwise(begins))
