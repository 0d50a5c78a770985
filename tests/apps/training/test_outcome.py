"""What a run leaves: only the final weights' evaluation is the run's; a dataset without tokenizer is fine."""

import dataclasses
from pathlib import Path

import torch

import modelzoo
from apps.training.config import parse
from apps.training.data.storage import open_dataset
from apps.training.outcome import Outcome, save_outcome
from apps.training.reporting.records import Evaluation, StepRecord
from apps.training.reporting.throughput import Efficiency

RECORD = StepRecord(step=4, epoch=1, loss=2.0, lr=1e-3, num_tokens=8, num_counted=6, seconds=0.5, grad_norm=None)


def outcome(**changes: object) -> Outcome:
    made = Outcome(
        title="demo on text",
        overview="Number of epochs: 1",
        routed_table="* dense",
        num_parameters=10,
        efficiency=Efficiency(flops=2e12),
        steps=[RECORD],
    )
    return dataclasses.replace(made, **changes)


def test_an_evaluation_of_earlier_weights_is_not_the_runs() -> None:
    assert outcome().last_evaluation is None
    assert outcome(evaluations=[Evaluation(2, 3.0, 6)]).last_evaluation is None
    assert outcome(evaluations=[Evaluation(2, 3.0, 6), Evaluation(4, 2.5, 6)]).last_evaluation.loss == 2.5


def test_a_run_is_measured_by_its_median_step() -> None:
    """The first steps load kernels."""
    steps = [dataclasses.replace(RECORD, seconds=seconds) for seconds in (60.0, 0.5, 0.5, 0.5)]
    run = outcome(steps=steps, efficiency=Efficiency(flops=2e12, peak=8e12, floor=0.4))
    assert run.efficiency_line == "Model FLOP/s: 4 T, MFU: 50.0% of 8 T, 80.0% of the floor"
    assert run.facts == {"MFU": "50.0%", "of floor": "80.0%"}
    assert outcome(steps=[]).efficiency_line is None
    assert outcome(steps=[]).facts == {}


def test_the_progress_line_has_the_last_loss_and_the_pace_of_the_last_steps() -> None:
    """Behind a checkpoint a step's time may be its neighbour's."""
    steps = [dataclasses.replace(RECORD, seconds=seconds) for seconds in [60.0] * 8 + [0.5] * 14 + [0.8, 0.2]]
    run = outcome(steps=steps, efficiency=Efficiency(flops=2e12, peak=8e12))
    assert run.live_fields == {"loss": "2.0000", "lr": "0.001", "tokens/s": "16", "MFU": "50.0%"}
    assert outcome().live_fields == {"loss": "2.0000", "lr": "0.001", "tokens/s": "16"}


def test_without_a_tokenizer_there_is_a_checkpoint_and_a_report_but_no_sample(
    settings: dict[str, str], tiny_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    dataset = dataclasses.replace(open_dataset(tiny_dataset, max_seq_length=32), folder=tmp_path)
    config = parse([f"{key}={value}" for key, value in settings.items()])
    model = modelzoo.build_model(modelzoo.load_config(config_name=tiny_model), dtype=torch.float32)
    save_outcome(tmp_path / "out", outcome(), model, dataset, config, sample=True)
    assert "Model FLOP/s: 4 T" in (tmp_path / "out" / "summary.txt").read_text()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "summary.txt", "loss.png", "report.html"} <= written
    assert "tokenizer.json" not in written
    assert "Sample text" not in (tmp_path / "out" / "report.html").read_text()
