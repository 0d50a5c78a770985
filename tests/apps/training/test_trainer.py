"""The loop and the evaluation: order, pauses, stops, exact numbers. Programs are stand-ins unless numbers matter."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from apps.training.config_schema import OptimizerConfig
from apps.training.data.packing import Rows
from apps.training.eager_program import EagerProgram, StepResult
from apps.training.nonfinite import NonFiniteLoss
from apps.training.optimizers.adamw import AdamW
from apps.training.parameter_groups import group_parameters
from apps.training.recipe import Recipe
from apps.training.steps import StepCount
from apps.training.trainer import Program, Trainer
from apps.training.workers.group import Workers
from apps.training.workers.launch import Launch
from backends.precision import resolve

COMPLETION, PADDING = 1, 2


@dataclass
class Noted:
    """A program whose loss of step n is n (or what `losses` says) and which notes what it was given."""

    losses: dict[int, float] = field(default_factory=dict)
    microbatches: list[int] = field(default_factory=list)
    tables: list[Tensor] = field(default_factory=list)
    skips: bool = False

    def train_step(
        self, microbatches: list, hyperparameters: Tensor, max_grad_norm: float | None, max_grad_value: float | None
    ) -> StepResult:
        self.microbatches.append(len(microbatches))
        self.tables.append(hyperparameters)
        step = len(self.microbatches)
        loss = torch.tensor(self.losses.get(step, float(step)))
        return StepResult(loss, None, applied=loss.isfinite() if self.skips else None)

    def evaluate(self, microbatch: dict) -> Tensor:
        return microbatch["grad_scale"].sum()


def recipe() -> Recipe:
    groups = group_parameters(OptimizerConfig(settings=AdamW.Config(lr=0.1)), {"weight": ((2, 2), "matrix")})
    return Recipe(groups, rate=lambda step, peak: peak / step, peak=0.1, max_grad_norm=None)


def trainer(
    program: Program, total: int, device: str = "cpu", accumulation: int = 1, first: int = 1, last: int | None = None
) -> Trainer:
    return Trainer(
        program=program,
        workers=Workers.solo(),
        names=["weight"],
        recipe=recipe(),
        count=StepCount(steps_per_epoch=3, total=total),
        accumulation=accumulation,
        device=torch.device(device),
        precision=resolve("float32"),
        article_attention=False,
        first_step=first,
        last_step=last or total,
    )


def endless_rows(padded: int = 0) -> Iterator[Rows]:
    types = np.full((2, 4), COMPLETION, dtype=np.int32)
    types[:, 4 - padded :] = PADDING
    while True:
        yield Rows(np.ones((2, 4), dtype=np.int32), types)


def never(*_: object) -> bool:
    return False


def test_every_step_is_recorded_once_and_in_order() -> None:
    records = list(trainer(Noted(), 7).steps(endless_rows(padded=1), pause_after=never, should_stop=never))
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert [record.epoch for record in records] == [1, 1, 1, 2, 2, 2, 3]
    assert [record.loss for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert [record.lr for record in records] == [0.1 / step for step in range(1, 8)]
    assert {(record.num_tokens, record.num_counted) for record in records} == {(6, 4)}
    assert all(record.seconds > 0 for record in records)


def test_a_step_takes_its_microbatches_and_this_steps_numbers() -> None:
    program = Noted()
    records = list(trainer(program, 2, accumulation=3).steps(endless_rows(), pause_after=never, should_stop=never))
    assert program.microbatches == [3, 3]
    assert records[0].num_tokens == 24
    names = AdamW.hyperparameter_names
    assert program.tables[1][0, names.index("lr")].item() == pytest.approx(0.05)
    assert program.tables[1][0, names.index("bias_correction1")].item() == pytest.approx(1 - 0.9**2)


@pytest.mark.parametrize(
    ("pauses", "expected"),
    [
        ((), "q1 q2 y1 q3 y2 q4 y3 y4"),  # the host is one step ahead of what it reads
        ((2,), "q1 q2 y1 y2 q3 q4 y3 y4"),  # after step 2 the model is at step 2
    ],
)
def test_a_gpus_loss_is_read_one_step_late_except_where_the_loop_pauses(pauses: tuple[int, ...], expected: str) -> None:
    events: list[str] = []

    class Watched(Noted):
        def train_step(self, *arguments: object) -> StepResult:
            events.append(f"q{len(self.microbatches) + 1}")
            return super().train_step(*arguments)

    loop = trainer(Watched(), 4, device="meta")  # like a GPU, not a CPU, and present everywhere
    for record in loop.steps(endless_rows(), pause_after=lambda step: step in pauses, should_stop=never):
        events.append(f"y{record.step}")
    assert " ".join(events) == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_stop_ends_the_loop_after_a_whole_step_and_loses_no_record(device: str) -> None:
    program, seen = Noted(), []
    for record in trainer(program, 100, device).steps(
        endless_rows(), pause_after=never, should_stop=lambda: len(seen) >= 5
    ):
        seen.append(record.step)
    assert seen == list(range(1, len(program.microbatches) + 1))
    assert len(seen) == {"cpu": 5, "meta": 6}[device]  # on a GPU one step was queued


def test_a_leg_takes_its_steps_of_the_whole_run() -> None:
    program, queued = Noted(), []
    leg = trainer(program, 9, first=4, last=6)
    records = list(leg.steps(endless_rows(), pause_after=never, should_stop=never, on_queued=queued.append))
    assert [record.step for record in records] == queued == [4, 5, 6]
    assert [record.epoch for record in records] == [2, 2, 2]
    assert [record.lr for record in records] == [0.1 / step for step in (4, 5, 6)]


def test_what_is_copied_behind_a_queued_step_sees_no_later_one() -> None:
    program, seen = Noted(), []
    loop = trainer(program, 5, device="meta")
    list(
        loop.steps(
            endless_rows(),
            pause_after=never,
            should_stop=never,
            on_queued=lambda step: seen.append((step, len(program.microbatches))),
        )
    )
    assert seen == [(step, step) for step in range(1, 6)]


def test_numbers_that_are_wanted_come_before_the_next_step_is_queued() -> None:
    """Two steps in a row are saved: the first has to be written before the second is copied."""
    program, seen = Noted(), []
    loop = trainer(program, 5, device="meta")
    for record in loop.steps(endless_rows(), pause_after=never, should_stop=never, on_queued=lambda step: step == 3):
        seen.append((record.step, len(program.microbatches)))
    assert seen == [(1, 2), (2, 3), (3, 3), (4, 5), (5, 5)]


class OneOfTwo(Workers):
    """Its sister counts as much as it does, and asks to stop before step `sister_stops`."""

    def __init__(self, sister_stops: int) -> None:
        super().__init__(Launch())
        self.calls, self.sister_stops = 0, sister_stops

    def sum_counts(self, *numbers: int) -> tuple[int, ...]:
        self.calls += 1
        *counts, stops = numbers
        return *(2 * count for count in counts), stops + int(self.calls >= self.sister_stops)


def test_counts_are_of_the_whole_job_and_any_worker_can_stop_it() -> None:
    scales = []

    class Watched(Noted):
        def train_step(self, microbatches: list, *arguments: object) -> StepResult:
            scales.append(microbatches[0]["grad_scale"].max().item())
            return super().train_step(microbatches, *arguments)

    loop = replace(trainer(Watched(), 9), workers=OneOfTwo(sister_stops=4))
    records = list(loop.steps(endless_rows(padded=1), pause_after=never, should_stop=never))
    assert [record.step for record in records] == [1, 2, 3]
    assert {(record.num_tokens, record.num_counted) for record in records} == {(12, 8)}
    assert scales == pytest.approx([1 / 8] * 3)  # N counts both workers' positions


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_names_the_step(bad: float) -> None:
    loop = trainer(Noted(losses={3: bad}), 10).steps(endless_rows(), pause_after=never, should_stop=never)
    assert [next(loop).step, next(loop).step] == [1, 2]
    with pytest.raises(NonFiniteLoss, match=rf"The loss of step 3 is {bad}.*Lower optimizer\.lr"):
        next(loop)


@pytest.mark.parametrize(
    ("of", "value", "bound", "ends"),
    [
        ("gradient norm", math.nan, None, True),
        ("gradient norm", math.inf, None, True),
        ("gradient norm", math.nan, 1.0, True),
        ("gradient norm", math.inf, 1.0, False),  # each gradient is at most 1 then
        ("objective", math.inf, None, True),
    ],
)
def test_so_does_a_gradient_that_is_not_finite_behind_a_loss_that_is(
    of: str, value: float, bound: float | None, ends: bool
) -> None:
    class Spoilt(Noted):
        def train_step(self, *arguments: object) -> StepResult:
            result, given = super().train_step(*arguments), torch.tensor(value if len(self.tables) == 2 else 1.0)
            return result._replace(**{of.replace("gradient", "grad").replace(" ", "_"): given})

    loop = trainer(Spoilt(), 3)
    loop = replace(loop, recipe=replace(loop.recipe, max_grad_value=bound))
    records = loop.steps(endless_rows(), pause_after=never, should_stop=never)
    assert next(records).step == 1
    if ends:
        with pytest.raises(NonFiniteLoss, match=rf"The {of} of step 2 is {value} .*it was not saved"):
            next(records)
    else:
        assert [record.step for record in records] == [2, 3]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("bad", "most", "before", "last"),
    [
        ((2, 4, 5, 8), 3, 0, 10),  # never three in a row
        ((2, 4, 5, 6, 7, 8), 3, 0, 6),
        ((3,), 1, 0, 3),
        ((1,), 3, 2, 1),  # two more came before the checkpoint
        ((1, 3, 4), 3, 1, 10),
        ((9, 10), 2, 0, 10),
    ],
)
def test_skipped_steps_are_recorded_and_too_many_in_a_row_end_the_loop_at_once(
    device: str, bad: tuple[int, ...], most: int, before: int, last: int
) -> None:
    program = Noted(losses=dict.fromkeys(bad, math.nan), skips=True)
    loop = replace(trainer(program, 10, device), skipped_before=before)
    loop = replace(loop, recipe=replace(loop.recipe, max_nonfinite_steps=most))
    records = list(loop.steps(endless_rows(), pause_after=never, should_stop=never))
    assert [record.step for record in records] == list(range(1, last + 1))
    assert [record.step for record in records if record.skipped] == [step for step in bad if step <= last]
    # also where losses are read late, no step was begun behind the last one
    assert len(program.microbatches) == last


def test_evaluation_is_the_mean_over_every_counted_position_with_padded_batches_in_it() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None
    )
    model = LlamaForCausalLM(config).double()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 13, (6, 5), dtype=np.int32)
    types = rng.integers(0, 4, (6, 5), dtype=np.int32)
    types[4:] = PADDING  # rows that fill up the last batch
    loop = Trainer(
        program=EagerProgram(model, precision=resolve("float64")),
        workers=Workers.solo(),
        names=[name for name, _ in model.named_parameters()],
        recipe=recipe(),
        count=StepCount(1, 1),
        accumulation=1,
        device=torch.device("cpu"),
        precision=resolve("float64"),
        article_attention=False,
        first_step=1,
        last_step=1,
    )
    ticks: list[None] = []
    batches = (Rows(ids[i : i + 2], types[i : i + 2]) for i in (0, 2, 4))
    found = loop.evaluate(batches, 7, lambda: ticks.append(None), should_stop=never)
    with torch.no_grad():
        log_p = model(torch.from_numpy(ids).long()).logits.log_softmax(-1)
    losses = [
        -log_p[b, t, ids[b, t + 1]].item()
        for b in range(6)
        for t in range(4)
        if types[b, t + 1] != PADDING and types[b, t] != 3
    ]
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-12)
    assert (found.num_counted, found.step, len(ticks)) == (len(losses), 7, 3)


def test_an_evaluation_that_is_stopped_has_no_result() -> None:
    assert trainer(Noted(), 1).evaluate(endless_rows(), 1, lambda: None, should_stop=lambda: True) is None
