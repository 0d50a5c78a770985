"""Runs with a teacher: what they minimise and leave, one worker and two, stopped and gone on, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modelzoo
from tests.apps.test_train_llm import losses, metrics, run
from tests.apps.test_train_llm_workers import job

STEP = {"training.batch_size": "2", "training.global_batch_size": "4", "optimizer.lr": "3e-3"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_dataset: Path) -> Path:
    """A wider model than the student that has learned a little."""
    folder = tmp_path_factory.mktemp("teacher")
    config = json.loads((tiny_model / "config.json").read_text()) | {"hidden_size": 48, "num_hidden_layers": 1}
    (folder / "shape").mkdir()
    (folder / "shape" / "config.json").write_text(json.dumps(config | {"head_dim": 24}))
    settings = {
        "command": "run",
        "compile.target": "eager",
        "compile.arch": "cpu",
        "checkpoint.config_name": str(folder / "shape"),
        "model.max_seq_length": "32",
        "training.dataset": str(tiny_dataset),
        "training.max_steps": "20",
        "training.evaluate": "false",
        "training.output_dir": str(folder / "run"),
        "optimizer.lr": "1e-2",
    }
    assert run(settings) == 0
    return folder / "run"


@pytest.fixture
def taught(settings: dict[str, str], teacher: Path) -> dict[str, str]:
    return settings | STEP | {"training.distill.model_name_or_path": str(teacher), "training.distill.temperature": "2"}


def objectives(folder: Path) -> list[float]:
    return [float(row["Objective"]) for row in metrics(folder)]


def test_the_first_objective_is_the_formula_on_the_first_rows(
    taught: dict[str, str], teacher: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    from apps.training.data.loader import TrainLoader
    from apps.training.data.storage import open_dataset
    from apps.training.loss import make_batch

    once = {"training__max_steps": "1", "training__evaluate": "false", "training__distill__weight": "0.3"}
    assert run(taught, **once, training__batch_size="4") == 0
    dataset = open_dataset(tiny_dataset, max_seq_length=32, vocab_size=300, batch_size=4, evaluate=False)
    batch = make_batch(next(iter(TrainLoader(dataset, batch_size=4, seed=42, rank=0, world_size=1))))
    config = modelzoo.load_config(config_name=taught["checkpoint.config_name"])
    student = modelzoo.build_model(config, seed=42)
    older = modelzoo.load_model(teacher, modelzoo.load_config(model_name_or_path=teacher))
    with torch.no_grad():
        logits, theirs = (
            each(input_ids=batch.input_ids, use_cache=False).logits.double()[batch.mask] for each in (student, older)
        )
    p, q = (theirs / 2).softmax(-1), (logits / 2).softmax(-1)
    divergence = 4 * (p * (p.log() - q.log())).sum(-1).mean()
    entropy = -logits.log_softmax(-1).gather(-1, batch.labels[batch.mask][:, None]).mean()
    assert losses(tmp_path / "out") == pytest.approx([float(entropy)], rel=1e-5)
    assert objectives(tmp_path / "out") == pytest.approx([float(0.7 * entropy + 0.3 * divergence)], rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("equal_regions_made_once")
def test_the_artifact_the_twin_two_workers_and_a_resumed_run_agree(
    taught: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {key: value for key, value in taught.items() if key != "compile.target"}
    given |= {"compile.output_dir": str(tmp_path / "artifacts"), "training.evaluate": "false"}
    assert run(given, training__output_dir=str(tmp_path / "none")) == 2  # no artifact yet: the command to make it
    command = capsys.readouterr().err
    assert f"training.distill.model_name_or_path={taught['training.distill.model_name_or_path']}" in command
    assert "training.distill.weight=0.5 training.distill.temperature=2.0" in command
    assert run(given, command="compile") == 0
    assert run(given, training__output_dir=str(tmp_path / "one")) == 0
    assert "teacher" in capsys.readouterr().out  # its memory is counted
    assert run(given, training__output_dir=str(tmp_path / "twin"), compile__target="eager") == 0
    done = job("mpich", 2, given, training__output_dir=str(tmp_path / "two"), training__shard_optimizer="true")
    assert done.returncode == 0, done.stderr
    saving = given | {"checkpoint.save": "true", "training.resume": "auto", "training.output_dir": str(tmp_path / "on")}
    assert run(saving, checkpoint__num_steps="2") == 0
    assert run(saving) == 0
    assert losses(tmp_path / "on") == losses(tmp_path / "one")
    assert objectives(tmp_path / "on") == objectives(tmp_path / "one")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "on")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for other in ("twin", "two"):
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
        assert objectives(tmp_path / other) == pytest.approx(objectives(tmp_path / "one"), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_name_or_path": "/nowhere"}, "no folder '/nowhere' (training.distill.model_name_or_path)"),
        ({"model_name_or_path": "null"}, "training.distill.temperature was given, but there is no teacher"),
        ({"weight": "1.5"}, "training.distill.weight"),
        ({"temperature": "0"}, "training.distill.temperature"),
        ({"weigth": "0.5"}, "Did you mean 'training.distill.weight'"),
    ],
)
def test_each_mistake_is_one_line_and_leaves_nothing(
    taught: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], told: str
) -> None:
    assert run(taught | {f"training.distill.{key}": value for key, value in changes.items()}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_vocabulary_or_without_weights_is_refused(
    taught: dict[str, str], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((teacher / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"vocab_size": 301}))
    given = taught | {"training.distill.model_name_or_path": str(tmp_path / "other")}
    assert run(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has a vocabulary of 301 tokens, the model one of 300. Expected a teacher of the same tokenizer." in line
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert run(given) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
