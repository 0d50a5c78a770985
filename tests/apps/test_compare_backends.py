"""compare_backends from the command line: what it prints and leaves, and one line for each mistake."""

import csv
import math
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

from apps.compare_backends import FILES, main
from modelzoo import build_model, load_config, save_model
from tests.apps.parity.known_errors import LOUDER, STORING, UNSEEN

ROOT = Path(__file__).resolve().parents[2]
SCALED = "tests.backends.stateful_backend:ScaledBackend"


@pytest.fixture
def arguments(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> dict[str, str]:
    """A comparison of a second, into tmp_path/out."""
    return {
        "backends": "[dense, dense]",
        "checkpoint.config_name": str(tiny_model),
        "model.max_seq_length": "32",
        "dataset": str(tiny_dataset),
        "batch_size": "2",
        "calibrate_batches": "2",
        "num_batches": "2",
        "eval_batches": "2",
        "timing_rounds": "1",
        "device": "cpu",
        "output_dir": str(tmp_path / "out"),
    }


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str], **changes: str
) -> tuple[int, str, str]:
    given = arguments | {key.replace("__", "."): value for key, value in changes.items()}
    monkeypatch.setattr(sys, "argv", ["compare_backends.py", *(f"{key}={value}" for key, value in given.items())])
    code = main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_backend_against_itself_has_no_error_anywhere(
    arguments: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, _ = run(capsys, monkeypatch, arguments)
    output = tmp_path / "out"
    assert code == 0
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    rows = rows_of(output / "parity.csv")
    assert len(rows) == 2 * 8 + 1
    for row in rows:
        errors = [value for key, value in row.items() if key.endswith("_error")]
        assert errors == (["0.0", "0.0", "", "0.0"] if row["kind"] == "attention" else ["0.0"] * 4)
        assert row["output_snr_db"] == row["accumulated_snr_db"] == "inf"
    first, second = rows_of(output / "parity_summary.csv")
    assert (second["backend"], second["kl_nats_per_token"]) == ("dense #2", "0.0")
    assert first["dev_loss"] == second["dev_loss"]
    assert float(second["perplexity"]) == pytest.approx(300, rel=0.1)  # random weights, 300 tokens
    assert matplotlib.image.imread(output / "parity.png").shape[0] > 300
    assert "dense #2" in (output / "parity.html").read_text(encoding="utf-8")
    assert f"Report saved at {output}/" in out


def test_several_backends_with_their_own_parameters_states_and_energies(
    arguments: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backends = (
        f"[dense, {{name: loud, use: '{LOUDER}', error: 0.125}}, '{STORING}', '{UNSEEN}', {{name: mlp, "
        f"rules: [{{match: '*.mlp.*', use: '{SCALED}', levels: 16}}]}}]"
    )
    code, out, _ = run(capsys, monkeypatch, arguments, backends=backends)
    assert code == 0
    rows = {(row["backend"], row["layer"]): row for row in rows_of(tmp_path / "out" / "parity.csv")}
    assert len(rows) == 4 * 17
    loud = rows["loud", "model.layers.1.self_attn.v_proj"]
    for measure in ("output", "input_gradient", "weight_gradient"):
        assert float(loud[f"{measure}_error"]) == pytest.approx(0.125, rel=1e-4)
        assert float(loud[f"{measure}_snr_db"]) == pytest.approx(-20 * math.log10(0.125), abs=1e-3)
    storing = rows["Storing", "model.layers.0.mlp.up_proj"]
    assert (storing["output_error"], storing["input_gradient_error"], storing["weight_gradient_error"]) == (
        ("0.0", "0.0", "")
    )
    assert float(rows["mlp", "model.layers.0.mlp.up_proj"]["output_error"]) > 0
    assert rows["mlp", "model.layers.0.self_attn.q_proj"]["accumulated_error"] == "0.0"
    assert float(rows["mlp", "model.layers.1.self_attn.q_proj"]["accumulated_error"]) > 0
    energies = {row["backend"]: row["joules_per_token"] for row in rows_of(tmp_path / "out" / "parity_summary.csv")}
    assert float(energies.pop("loud")) > 0
    assert set(energies.values()) == {""}
    assert "model.layers.{0-1}.mlp.down_proj" in out
    assert "assumption: made up" in out


def test_weights_come_from_a_checkpoint_and_are_not_changed(
    arguments: dict[str, str],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = save_model(build_model(load_config(config_name=tiny_model), seed=7), tmp_path / "model")
    weights = (saved / "model.safetensors").read_bytes()
    del arguments["checkpoint.config_name"]
    losses = []
    for number, source in enumerate(({"model_name_or_path": str(saved)}, {"config_name": str(tiny_model)})):
        changes = {f"checkpoint__{key}": value for key, value in source.items()}
        output = tmp_path / str(number)
        assert run(capsys, monkeypatch, arguments, seed="7", output_dir=str(output), **changes)[0] == 0
        losses.append(rows_of(output / "parity_summary.csv")[0]["dev_loss"])
    assert losses[0] == losses[1]
    assert (saved / "model.safetensors").read_bytes() == weights


def test_a_report_is_replaced_only_when_told(
    arguments: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, monkeypatch, arguments)[0] == 0
    code, _, err = run(capsys, monkeypatch, arguments)
    assert code == 2
    assert "holds a report or a run (parity.csv, " in err
    assert run(capsys, monkeypatch, arguments, overwrite="true")[0] == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_no_error_against_itself_and_its_memory_is_measured(
    arguments: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, _, _ = run(capsys, monkeypatch, arguments, device="cuda", model__dtype="bfloat16")
    assert code == 0
    rows = rows_of(tmp_path / "out" / "parity.csv")
    assert {row["output_error"] for row in rows} == {row["accumulated_error"] for row in rows} == {"0.0"}
    # Kernels that add with atomics may give gradients in another order of sums.
    assert max(float(row["input_gradient_error"]) for row in rows) < 1e-2
    assert all(int(row["step_memory_bytes"]) > 0 for row in rows_of(tmp_path / "out" / "parity_summary.csv"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"backends": "[dense]"}, "backends has 1 entry. Expected two at least"),
        ({"backends": "[dense, dens]"}, "Unknown backend 'dens'. Did you mean 'dense'?"),
        ({"backends": "dense"}, "Wrong value backends=dense. Expected list."),
        ({"backends": f"[dense, {{use: '{SCALED}', level: 4}}]"}, "Did you mean 'levels'?"),
        ({"backends": f"[dense, {{use: '{SCALED}', levels: 1}}]"}, "levels is 1. Expected at least 2."),
        ({"backends": "[dense, {rules: [{match: '*.mpl.*', use: dense}]}]"}, "matches no layer"),
        ({"backends": f"[dense, '{UNSEEN}']", "calibrate_batches": "0"}, "calibrate_batches=0 leaves 'largest' of"),
        ({"checkpoint__model_name_or_path": "nowhere"}, "exactly one of checkpoint.config_name or"),
        ({"checkpoint__config_name": "dmo"}, "Did you mean 'demo'?"),
        ({"dataset": "nowhere"}, "There is no dataset folder 'nowhere'"),
        ({"model__max_seq_length": "64"}, "Set model.max_seq_length=32"),
        ({"batch_size": "100000"}, "Use a smaller batch"),
        ({"num_batches": "0"}, "Wrong value num_batches=0. Expected int, at least 1."),
        ({"eval_batches": "0"}, "Wrong value eval_batches=0"),
        ({"num_batch": "3"}, "Did you mean 'num_batches'?"),
        ({"model__dtype": "float16"}, "Wrong value model.dtype=float16"),
        ({"output_dir": __file__}, "is a file. Expected a folder"),
    ],
)
def test_each_mistake_is_one_line_and_leaves_nothing(
    arguments: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    told: str,
) -> None:
    code, _, err = run(capsys, monkeypatch, arguments, **changes)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_one_line_too(
    arguments: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from apps.parity import comparing

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee the documentation.")

    monkeypatch.setattr(comparing, "local_errors", fail)
    code, _, err = run(capsys, monkeypatch, arguments)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: CUDA out of memory. Tried to allocate 20 GiB. Lower batch_size")
    assert not (tmp_path / "out").exists()


def test_without_dev_rows_there_is_nothing_to_compare_on(
    arguments: dict[str, str],
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(tiny_dataset, tmp_path / "data", ignore=shutil.ignore_patterns("dev_*"))
    code, _, err = run(capsys, monkeypatch, arguments, dataset=str(tmp_path / "data"))
    assert code == 2
    assert "has no dev rows to take logits and perplexity on" in err


@pytest.mark.parametrize("place", ["", "apps"])
def test_it_starts_from_the_root_and_from_its_own_folder(place: str) -> None:
    script = "compare_backends.py" if place else "apps/compare_backends.py"
    command = [sys.executable, script, "backends=[dense]", "checkpoint.config_name=demo"]
    done = subprocess.run(command, cwd=ROOT / place, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: backends has 1 entry.")


def test_a_target_against_itself_has_no_error(
    arguments: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"backends": "[optical]", "targets": "[eager, {target: eager, name: again}]"}
    code, out, _ = run(capsys, monkeypatch, arguments, **changes)
    output = tmp_path / "out"
    assert code == 0
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", "targets.csv", "targets_gradients.csv"]
    first, second = rows_of(output / "targets.csv")
    assert (first["target"], second["target"]) == ("eager", "again")
    assert float(first["first_loss"]) == pytest.approx(math.log(300), rel=0.05)  # random weights, 300 tokens
    assert first["last_loss"] == second["last_loss"] != first["first_loss"]
    for error in ("worst_loss_error", "worst_gradient_error", "worst_weight_error"):
        assert second[error] == "0.0"
    gradients = rows_of(output / "targets_gradients.csv")
    assert {row["target"] for row in gradients} == {"again"}
    assert len(gradients) == 2 * 9 + 3
    assert "eager (reference)" in out
    code, _, err = run(capsys, monkeypatch, arguments, **changes)
    assert (code, "holds a report" in err) == (2, True)


def test_targets_compare_one_backend(
    arguments: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, monkeypatch, arguments, targets="[eager, mlir]")
    assert code == 2
    assert "backends has 2 entries. Give one" in err
    assert not (tmp_path / "out").exists()
