"""Runs over low-rank layers through their artifact: the twin's numbers, one worker and two, stopped and gone on."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apps.compare_backends import program as compare
from apps.compress_llm import program as compress
from apps.generate_text import generate
from apps.training.cli import run_main
from tests.apps.test_train_llm import losses, run
from tests.apps.test_train_llm_workers import job

pytestmark = pytest.mark.usefixtures("equal_regions_made_once")
STEP = {"training.batch_size": "2", "training.global_batch_size": "4", "training.evaluate": "false"}


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_dataset: Path) -> Path:
    """A compressed model that has learned a little, with its tokenizer."""
    folder = tmp_path_factory.mktemp("low")
    settings = {
        "command": "run",
        "compile.target": "eager",
        "compile.arch": "cpu",
        "checkpoint.config_name": str(tiny_model),
        "model.max_seq_length": "32",
        "training.dataset": str(tiny_dataset),
        "training.max_steps": "10",
        "training.evaluate": "false",
        "training.output_dir": str(folder / "dense"),
        "optimizer.lr": "1e-2",
    }
    assert run(settings) == 0
    arguments = [f"checkpoint.model_name_or_path={folder / 'dense'}", f"compress.calibration={tiny_dataset}"]
    arguments += ["compress.keep=0.6", "compress.allocation=spectrum", "compress.tokens=512", "max_seq_length=32"]
    assert run_main(compress, [*arguments, "device=cpu", "evaluate=false", f"output_dir={folder / 'low'}"]) == 0
    return folder / "low"


@pytest.fixture
def on_low(settings: dict[str, str], low: Path, tmp_path: Path) -> dict[str, str]:
    """Settings of a run from the compressed model through an artifact."""
    given = {key: value for key, value in settings.items() if key not in ("checkpoint.config_name", "compile.target")}
    artifacts = {"compile.output_dir": str(low.parent / "artifacts")}  # one for all tests of this file
    return given | STEP | artifacts | {"checkpoint.model_name_or_path": str(low)}


def compiled(settings: dict[str, str]) -> dict[str, str]:
    if not list(Path(settings["compile.output_dir"]).glob("*.substrate")):
        assert run(settings, command="compile") == 0
    return settings


@pytest.mark.slow
def test_the_artifact_gives_the_twins_losses_and_stopped_the_same_bits(
    on_low: dict[str, str], low: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts, twin = (tmp_path / name for name in ("whole", "parts", "twin"))
    given = compiled(on_low)
    assert run(given, training__output_dir=str(whole)) == 0
    assert "(as stored)" in capsys.readouterr().out
    assert run(given, training__output_dir=str(twin), compile__target="eager") == 0
    assert losses(whole) == pytest.approx(losses(twin), rel=1e-6)
    assert len(losses(whole)) == 4
    saving = given | {"checkpoint.save": "true", "training.resume": "auto", "training.output_dir": str(parts)}
    assert run(saving, checkpoint__num_steps="2") == 0
    saved = parts / "checkpoints" / "iter_2"
    stored = json.loads((low / "config.json").read_text())["stored_layers"]
    assert json.loads((saved / "config.json").read_text())["stored_layers"] == stored
    assert run(saving) == 0
    assert losses(parts) == losses(whole)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (parts, whole))
    assert ours.keys() == theirs.keys() == load_file(low / "model.safetensors").keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_two_workers_give_the_numbers_of_one(on_low: dict[str, str], tmp_path: Path) -> None:
    given = compiled(on_low)
    assert run(given, training__output_dir=str(tmp_path / "one")) == 0
    done = job("mpich", 2, given, training__shard_optimizer="true")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["scratch", "dense"])
def test_a_rule_makes_layers_low_rank(
    start: str, settings: dict[str, str], low: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings | STEP | {"backend.rules": "[{match: '*.q_proj', use: lowrank, rank: 5}]"}
    if start == "dense":
        del given["checkpoint.config_name"]
        given["checkpoint.model_name_or_path"] = str(low.parent / "dense")
    del given["compile.target"]
    given["compile.output_dir"] = str(tmp_path / "artifacts")
    assert run(given, command="compile") == 0
    assert run(given, training__output_dir=str(tmp_path / "ours")) == 0
    assert run(given, training__output_dir=str(tmp_path / "twin"), compile__target="eager") == 0
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "twin"), rel=1e-6)
    assert "lowrank" in capsys.readouterr().out
    written = json.loads((tmp_path / "ours" / "config.json").read_text())["stored_layers"]
    assert written == {f"model.layers.{index}.self_attn.q_proj": {"use": "lowrank", "rank": 5} for index in range(2)}


def test_it_is_generated_from_and_compared(
    low: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"checkpoint.model_name_or_path={low}", "prompt=the", "max_new_tokens=4"]
    assert run_main(generate, arguments) == 0
    comparison = [
        arguments[0], f"dataset={tiny_dataset}", "model.max_seq_length=32", "batch_size=2", "num_batches=2",
        "eval_batches=2", "timing_rounds=1", "device=cpu", f"output_dir={tmp_path / 'out'}", "backends=[dense, dense]",
    ]  # fmt: skip
    capsys.readouterr()
    assert run_main(compare, comparison) == 0, capsys.readouterr().err
    with (tmp_path / "out" / "parity.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {"linear", "attention"}
    assert {float(row["output_error"]) for row in rows} == {0.0}
