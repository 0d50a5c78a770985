"""The printed lines, letter by letter: users' scripts look for them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from apps.training.config import parse
from apps.training.reporting.lines import evaluation_line, overview, settings_text, short, step_line, tell_unread
from apps.training.reporting.records import Evaluation, StepRecord
from apps.training.schedules.trapezoid import Trapezoid
from apps.training.steps import StepCount

RECORD = StepRecord(
    step=1, epoch=1, loss=11.19057, lr=1e-5, num_tokens=2691, num_counted=2600, seconds=0.5, grad_norm=1.25
)


def test_the_step_line_is_the_reference_apps() -> None:
    position = StepCount(2622, 2622).position(1)
    expected = "Epoch [1/1], Step [1/2622], Loss: 11.1906, LR: 1e-05, Num tokens this step: 2691"
    assert step_line(RECORD, position) == expected
    assert step_line(RECORD, position, workers=2) == "DP: 2-way, " + expected
    assert step_line(replace(RECORD, objective=12.0), position) == expected + ", Objective: 12.0000"


def test_the_overview_is_the_reference_apps() -> None:
    assert overview(StepCount(2622, 2622), batch_size=16, workers=2).splitlines() == [
        "Number of epochs: 1",
        "Per worker batch size: 16",
        "Per worker number of batches (steps): 2,622",
        "Number of DP workers: 2",
    ]


def test_settings_are_spelled_as_one_types_them() -> None:
    settings = Trapezoid.Config(warmup_steps=3)
    assert settings_text("trapezoid", settings) == "trapezoid (warmup_steps 3, decay_steps null, final_ratio 0)"


def test_the_evaluation_line() -> None:
    assert evaluation_line(Evaluation(10, math.log(20), 5)) == "Evaluation loss: 2.9957, Perplexity: 20.0000"
    assert Evaluation(10, 1e4, 5).perplexity == math.inf


@pytest.mark.parametrize(
    ("number", "text"),
    [(5.25, "5.25"), (812, "812"), (999.6, "1k"), (12345, "12.3k"), (1.236e6, "1.24M"), (7e10, "70B")],
)
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text


UNREAD_PATH = (
    "warning: checkpoint.load_path=there is not read: checkpoint.load=false. "
    "Add checkpoint.load=true to go on from it.\n"
)
UNREAD_ALPHA = "warning: lora.alpha=16 is not read: lora.r=0 trains all weights. Set lora.r too to train updates.\n"


@pytest.mark.parametrize(
    ("given", "checkpoint", "told"),
    [
        ("", None, ""),
        ("checkpoint.load_path=there", None, UNREAD_PATH),
        ("checkpoint.load_path=there lora.alpha=16", None, UNREAD_PATH + UNREAD_ALPHA),
        ("checkpoint.load_path=there", Path("own/iter_3"), ""),  # training.resume=auto had one of this run's own
        ("checkpoint.load_path=there checkpoint.load=true", Path("there/iter_3"), ""),
        ("lora.alpha=16 lora.r=4", None, ""),
        ("lora.alpha=16 lora.adapter=there", None, ""),
    ],
)
def test_a_setting_that_nothing_reads_is_told(
    given: str, checkpoint: Path | None, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_unread(parse(["command=run", *given.split()]), checkpoint)
    assert capsys.readouterr().err == told
