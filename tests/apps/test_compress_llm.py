"""compress_llm from the command line: what it prints and leaves, who can read that, and one line for each mistake."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

import modelzoo
from apps.compress_llm import main
from apps.training.workers.group import Workers
from tests import warm_python

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_dataset: Path) -> Path:
    """A tiny model that has learned something, with its tokenizer."""
    from apps.train_llm import main as train

    folder = tmp_path_factory.mktemp("trained") / "run"
    arguments = {
        "command": "run",
        "compile.target": "eager",
        "compile.arch": "cpu",
        "checkpoint.config_name": tiny_model,
        "model.max_seq_length": 32,
        "training.batch_size": 4,
        "training.max_steps": 30,
        "training.num_epochs": 4,
        "training.dataset": tiny_dataset,
        "training.output_dir": folder,
        "training.evaluate": "false",
        "optimizer.lr": 1e-2,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_llm.py", *(f"{key}={value}" for key, value in arguments.items())])
        assert train() == 0
    return folder


@pytest.fixture
def arguments(trained: Path, tiny_dataset: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "checkpoint.model_name_or_path": trained,
        "compress.calibration": tiny_dataset,
        "compress.keep": 0.6,
        "compress.tokens": 512,
        "max_seq_length": 32,
        "batch_size": 4,
        "device": "cpu",
        "output_dir": tmp_path / "low",
    }


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: dict[str, object], *more: str
) -> tuple[int, str, str]:
    settings = [f"{key}={value}" for key, value in given.items() if value is not None]
    monkeypatch.setattr(sys, "argv", ["compress_llm.py", *settings, *more])
    code = main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_what_is_compressed_goes_on_like_any_other_checkpoint(
    arguments: dict[str, object],
    trained: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, err = run(capsys, monkeypatch, arguments | {"compress.allocation": "spectrum"})
    assert code == 0, err
    before, after = (
        float(found) for found in re.findall(r"^Perplexity (?:before|after): ([\d.]+)$", out, re.MULTILINE)
    )
    assert out.rstrip().splitlines()[-1].startswith("Perplexity after:")
    assert before < after * 1.05
    assert after < 200  # the random model has 300
    low = tmp_path / "low"
    with (low / "compression.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 7
    for row in rows:
        if row["rank"]:
            assert float(row["predicted"]) == pytest.approx(float(row["measured"]), rel=1e-4, abs=1e-9)
            assert int(row["numbers"]) == int(row["rank"]) * (int(row["in"]) + int(row["out"]))
    assert sum(int(row["numbers"]) for row in rows) <= 0.6 * sum(int(row["dense_numbers"]) for row in rows)
    assert matplotlib.image.imread(low / "compression.png").shape[0] > 300

    from apps.generate_text import main as generate
    from apps.train_llm import main as train

    monkeypatch.setattr(
        sys, "argv", ["generate_text.py", f"checkpoint.model_name_or_path={low}", "prompt=the", "max_new_tokens=4"]
    )
    assert generate() == 0
    tuned = [
        "command=run", "compile.target=eager", "compile.arch=cpu", f"checkpoint.model_name_or_path={low}",
        "model.max_seq_length=32", "training.batch_size=4", "training.max_steps=12", f"training.dataset={tiny_dataset}",
        f"training.output_dir={tmp_path / 'tuned'}", "training.evaluate=false", "optimizer.lr=3e-3",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_llm.py", *tuned])
    assert train() == 0
    out = capsys.readouterr().out
    assert "(as stored)" in out
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["stored_layers"] == json.loads((low / "config.json").read_text())["stored_layers"]

    plain = {"checkpoint.model_name_or_path": tmp_path / "tuned", "output_dir": tmp_path / "plain"}
    code, out, err = run(capsys, monkeypatch, plain, "--expand")
    assert code == 0, err
    models = [
        modelzoo.load_model(folder, modelzoo.load_config(model_name_or_path=folder))
        for folder in (tmp_path / "tuned", tmp_path / "plain")
    ]
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in models]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_ranks_by_name_and_a_layer_above_break_even(
    arguments: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {"compress.keep": None, "compress.ranks": "{'*.self_attn.q_*': 4, gate_proj: 30}", "evaluate": "false"}
    code, out, err = run(capsys, monkeypatch, arguments | ranks | {"compress.method": "svd"})
    assert code == 0, err
    assert "Layers: 2 compressed, 2 left dense" in out
    said = "Left dense, given a rank or a share of numbers at which two factors hold no fewer numbers: "
    assert f"{said}model.layers.0.mlp.gate_proj, model.layers.1.mlp.gate_proj" in out
    assert "Perplexity" not in out


def test_a_row_is_taken_once_however_many_tokens_are_asked_for(
    arguments: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {"compress.tokens": 20_000, "compress.keep": None, "compress.ranks": "{q_proj: 4}", "evaluate": "false"}
    code, out, err = run(capsys, monkeypatch, arguments | many)
    assert code == 0, err
    told = re.search(r"^Calibration: ([\d,]+) tokens of .*/dataset, all that its full batches hold$", out, re.MULTILINE)
    assert told is not None
    assert 50 * 32 < int(told[1].replace(",", "")) < 200 * 32  # some 100 rows


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is first used
def test_learned_factors_have_their_losses_saved(
    arguments: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = {"compress.method": "mimic_gd", "compress.inputs": "dense", "compress.lr": 3e-3, "compress.epochs": 10}
    code, out, err = run(capsys, monkeypatch, arguments | learned | {"compress.match": "[q_proj, o_proj]"})
    assert code == 0, err
    assert "Batch [40/40], Mean loss:" in out
    with (tmp_path / "low" / "mimic_losses.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["batch"] for row in rows] == ["8", "16", "24", "32", "40"]
    layers = [name for name in rows[0] if name != "batch"]
    assert len(layers) == 4
    for name in layers:
        assert float(rows[-1][name]) < float(rows[0][name])


def test_two_workers_write_what_one_writes(
    arguments: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, monkeypatch, arguments)[0] == 0
    two = arguments | {"output_dir": tmp_path / "two", "batch_size": 2}
    command = [str(Path(sys.executable).with_name("mpirun")), "-np", "2", warm_python.python(), "apps/compress_llm.py"]
    command += [f"{key}={value}" for key, value in two.items()]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Perplexity after:") == 1
    tables = []
    for folder in ("low", "two"):
        with (tmp_path / folder / "compression.csv").open(newline="", encoding="utf-8") as file:
            tables.append([(row["layer"], row["rank"], float(row["measured"])) for row in csv.DictReader(file)])
    for one, other in zip(*tables, strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], rel=1e-4)


def test_the_watch_hears_of_each_batch_and_of_each_sum(
    arguments: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others wait meanwhile: a worker that says nothing for worker_timeout seconds would end the job."""
    told: list[str] = []
    monkeypatch.setattr(Workers, "doing", lambda self, what: told.append(what))
    monkeypatch.setattr(Workers, "waiting", lambda self, what: told.append(what))
    passes = {"compress.allocation": "spectrum", "compress.weighting": "gradient", "progress": "on"}
    monkeypatch.setattr("apps.training.progress.LIVE_INTERVAL", 0.0)
    code, _, err = run(capsys, monkeypatch, arguments | passes | {"batch_size": 2})
    assert code == 0
    first = told.index(next(each for each in told if each.startswith("compressing, 1 of ")))
    batches = [what for what in told[:first] if what.startswith("taking the perplexity, batch")]
    assert len(batches) > 1
    assert batches[-1].split()[-1] == str(len(batches))
    assert told[:first].count("compressing") == told[:first].count("waiting for the others' moments") > 2
    for pass_ in ("gradients, 8 of 8 batches", "spectra, 2 of 2 blocks"):
        assert f"taking {pass_} done" in told[:first]
        assert f"Taking {pass_.replace(', ', ' ').replace(' of ', '/')}" in err
    assert told[-1] == batches[-1]  # the last thing, behind what is saved


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"compress.keep": 1.5}, "compress.keep=1.5. Expected the share of the layers' numbers"),
        ({"compress.keep": None}, "exactly one of compress.keep and compress.ranks"),
        ({"compress.keep": None, "compress.ranks": "{q_proj: x}"}, "Expected a rank for each name of a layer"),
        (
            {"compress.keep": None, "compress.ranks": "{q_proj: 99}"},
            "gives layer 'model.layers.0.self_attn.q_proj' rank",
        ),
        (
            {"compress.keep": None, "compress.ranks": "{qq_proj: 9}"},
            "Compression's pattern 'qq_proj' names no linear layer",
        ),
        ({"compress.keep": None, "compress.ranks": "{q_proj: 4}", "compress.match": "[up_proj]"}, "got compress.match"),
        (
            {"compress.keep": None, "compress.ranks": "{q_proj: 4}", "compress.allocation": "spectrum"},
            "got compress.allocation=spectrum too. Leave one of them out",
        ),
        ({"compress.method": "svdllm"}, "svd_llm"),
        ({"checkpoint.model_name_or_path": "/nowhere"}, "no folder '/nowhere'"),
        ({"max_seq_length": 64}, "not compatible with this model (seq len 64). Set max_seq_length=32, or prepare"),
        ({"max_seq_length": 512}, "the 256 positions of this model (max_position_embeddings). Use max_seq_length=256"),
        ({"compress.method": "mimic_gd"}, "Add compress.inputs=dense"),
        ({"compress.targets": "dens"}, "Did you mean 'dense'"),
        ({"compress.targets": "dense", "compress.method": "svd_llm"}, "got compress.method=svd_llm. Choose mimic"),
        ({"compress.targets": "dense", "compress.inputs": "dense"}, "Expected compress.inputs=compressed"),
        ({"compress.weighting": "gradients"}, "Did you mean 'gradient'"),
        ({"compress.weighting": "gradient", "compress.method": "svd"}, "got compress.method=svd. Choose mimic"),
        ({"compress.match": "[lm_head]"}, "is in none of the model's blocks"),
    ],
)
def test_each_mistake_is_one_line_and_leaves_nothing(
    arguments: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    told: str,
) -> None:
    code, _, err = run(capsys, monkeypatch, arguments | changes)
    assert code == 2
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "low").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"output_dir": "/proc/low"}, "Cannot write output_dir=/proc/low: "),
        ({"compress.calibration": "/nowhere"}, "There is no dataset folder '/nowhere'"),
    ],
)
def test_where_it_reads_and_writes_is_looked_at_before_weights_are_loaded(
    arguments: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    told: str,
) -> None:
    monkeypatch.setattr(modelzoo, "load_model", None)
    code, _, err = run(capsys, monkeypatch, arguments | changes)
    assert code == 2
    assert told in err


def test_a_compressed_checkpoint_is_not_compressed_again(
    arguments: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, monkeypatch, arguments | {"evaluate": "false"})[0] == 0
    again = {"checkpoint.model_name_or_path": tmp_path / "low", "output_dir": tmp_path / "again"}
    code, _, err = run(capsys, monkeypatch, arguments | again)
    assert code == 2
    assert "already. Compress the dense checkpoint it came from" in err
    code, _, err = run(
        capsys,
        monkeypatch,
        {"checkpoint.model_name_or_path": tmp_path / "low", "output_dir": tmp_path / "low"},
        "--expand",
    )
    assert code == 2
    assert "is not empty" in err
