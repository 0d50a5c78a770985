"""`command=run` from end to end with the eager twin: what it prints and leaves, judged by plain transformers."""

import csv
import re
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from apps.train_llm import program
from apps.training.cli import run_main

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "apps" / "train_llm.py"
STEP_LINE = re.compile(
    r"^Epoch \[\d+/\d+\], Step \[\d+/\d+\], Loss: (\d+\.\d{4}), LR: (\S+), Num tokens this step: (\d+)$", re.MULTILINE
)


def arguments(settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def run(settings: dict[str, str], **changes: str) -> int:
    """In this process; a change's key is written with __ for the dot."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return run_main(program, arguments(settings | changed))


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "per_step_metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[float]:
    return [float(row["Step Loss"]) for row in metrics(folder)]


def test_a_run_prints_and_writes_what_it_should(settings: dict[str, str], tiny_dataset: Path, tmp_path: Path) -> None:
    """As a user starts it: a fresh process, from another folder."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments(settings)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path / "out"
    lines = done.stdout.splitlines()
    start = lines.index("Number of epochs: 1")
    assert lines[start + 1 : start + 4] == [
        "Per worker batch size: 4",
        "Per worker number of batches (steps): 4",
        "Number of DP workers: 1",
    ]
    assert lines[start + 4].startswith("Epoch [1/1], Step [1/4], Loss: 5.7")
    assert len(STEP_LINE.findall(done.stdout)) == 4
    evaluation = re.search(r"^Evaluation loss: (\d+\.\d+), Perplexity: \d+\.\d+$", done.stdout, re.MULTILINE)
    assert float(evaluation.group(1)) == pytest.approx(dev_loss_by_transformers(out, tiny_dataset), abs=1e-4)
    shown = [float(loss) for loss, _, _ in STEP_LINE.findall(done.stdout)]
    for line in (
        f"Last training loss: {shown[-1]:.4f}",
        f"Best training loss: {min(shown):.4f} (step {shown.index(min(shown)) + 1})",
        f"Smoothed training loss: {shown[-1]:.4f} (mean of the last 1 steps)",
        f"Checkpoint saved at {out}/",
        f"Summary saved at {out}/summary.txt",
        f"Metrics saved at {out}/per_step_metrics.csv",
        f"Report saved at {out}/report.html",
    ):
        assert line in lines
    assert {"config.json", "model.safetensors", "tokenizer.json", "config.yaml", "loss.png", "report.html"} <= {
        path.name for path in out.iterdir()
    }
    assert not [path for path in [*out.iterdir(), *tmp_path.iterdir()] if path.name.startswith(".")]

    rows = metrics(out)
    assert list(rows[0])[:4] == ["Tokens in Step", "Step Loss", "Learning Rate", "Time per Step"]
    assert {row.pop("Objective", "") for row in rows} == {""}  # no other than the loss
    assert all(float(value) >= 0 for row in rows for value in row.values())  # plain numbers, every one
    assert [f"{float(row['Step Loss']):.4f}" for row in rows] == [loss for loss, _, _ in STEP_LINE.findall(done.stdout)]
    summary = (out / "summary.txt").read_text()
    assert f"Total tokens seen: {sum(int(row['Tokens in Step']) for row in rows)}\n" in summary
    assert '"LlamaForCausalLM"' in summary
    assert "Sample text" in (out / "report.html").read_text()


def dev_loss_by_transformers(checkpoint: Path, dataset: Path) -> float:
    """Mean cross-entropy of the dev split, position by position, without this project."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert AutoTokenizer.from_pretrained(checkpoint).vocab_size <= 300
    total, counted = 0.0, 0
    for file in sorted(dataset.glob("dev_*.hdf5")):
        with h5py.File(file) as content:
            ids, types = content["input_ids"][:], content["token_type_ids"][:]
        with torch.no_grad():
            log_p = model(torch.from_numpy(ids).long()).logits.double().log_softmax(-1).numpy()
        for b, t in np.ndindex(ids.shape[0], ids.shape[1] - 1):
            if types[b, t + 1] != 2 and types[b, t] != 3:
                total -= log_p[b, t, ids[b, t + 1]]
                counted += 1
    return total / counted


def test_ctrl_c_finishes_the_step_saves_everything_and_exits_130(settings: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *arguments(settings | {"training.max_steps": "1000000"})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "Step [3/" in line:
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ctrl-C: finishing this step, then saving." in errors
    assert "Traceback" not in errors
    assert f"Checkpoint saved at {tmp_path / 'out'}/" in rest
    rows = metrics(tmp_path / "out")
    assert [int(row["Step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) == 3 + len(STEP_LINE.findall(rest))
    assert "Evaluation" not in rest
    assert (tmp_path / "out" / "report.html").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_run_goes_on_from_the_folder_another_one_left(settings: dict[str, str], tmp_path: Path) -> None:
    faster = {"optimizer__lr": "3e-3", "training__max_steps": "20"}
    assert run(settings, **faster) == 0
    del settings["checkpoint.config_name"]
    second = {"checkpoint__model_name_or_path": str(tmp_path / "out"), "training__output_dir": str(tmp_path / "second")}
    assert run(settings, **second) == 0
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "out")[0] - 0.5
    assert losses(tmp_path / "second")[0] == pytest.approx(losses(tmp_path / "out")[-1], abs=0.4)


def test_its_own_config_file_repeats_a_run_number_by_number(settings: dict[str, str], tmp_path: Path) -> None:
    assert run(settings, training__seed="7", schedule__warmup_steps="2") == 0
    stored = tmp_path / "out" / "config.yaml"
    assert yaml.safe_load(stored.read_text())["training"]["seed"] == 7
    assert run_main(program, [f"config={stored}", f"training.output_dir={tmp_path / 'again'}"]) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "out")
    assert run(settings, training__seed="8", training__output_dir=str(tmp_path / "other")) == 0
    assert losses(tmp_path / "other") != losses(tmp_path / "out")


def test_accumulated_microbatches_give_the_losses_of_the_whole_batch(settings: dict[str, str], tmp_path: Path) -> None:
    assert run(settings, model__dtype="float64") == 0
    cut = {"training__batch_size": "1", "training__gradient_accumulation_steps": "4"}
    assert run(settings, model__dtype="float64", training__output_dir=str(tmp_path / "cut"), **cut) == 0
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "out"), rel=1e-12)
    tokens = [[row["Tokens in Step"] for row in metrics(tmp_path / name)] for name in ("out", "cut")]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"model.article_attention": "true"},
        {"model.dtype": "bfloat16"},
        {"training.max_grad_norm": "null", "training.evaluate": "false", "logging.every": "2"},
    ],
)
def test_variants_train_too(settings: dict[str, str], tmp_path: Path, changes: dict[str, str]) -> None:
    assert run(settings | changes) == 0
    assert len(losses(tmp_path / "out")) == 4


def test_evaluation_every_so_many_steps_judges_the_weights_of_that_step(
    settings: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = re.compile(r"Evaluation loss: (\S+),")
    assert run(settings, training__eval_steps="2", schedule__final_ratio="1") == 0
    lines = capsys.readouterr().out
    assert len(found.findall(lines)) == 2
    assert lines.index("Step [2/4]") < lines.index("Evaluation loss") < lines.index("Step [3/4]")
    shorter = {"training__max_steps": "2", "training__output_dir": str(tmp_path / "two"), "schedule__final_ratio": "1"}
    assert run(settings, **shorter) == 0
    assert found.findall(capsys.readouterr().out) == found.findall(lines)[:1]


def test_a_loss_that_explodes_stops_with_code_1_and_leaves_the_old_checkpoint(
    settings: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(settings) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    again = {"training__overwrite_output_dir": "true", "training__max_grad_norm": "null"}
    assert run(settings, optimizer__lr="1e30", training__max_steps="30", **again) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: The loss of step \d+ is (nan|inf) at learning rate \S+; it was not saved\.", error)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "out" / "summary.txt").exists()
