"""A sweep from its command line: what it compiles, runs, leaves and goes on with. Two tests train, others pretend."""

import csv
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from apps.sweep import program
from apps.sweeping import planning
from apps.training.cli import run_main
from tests import warm_python
from tests.apps.sweeping.fakes import FakeRunner, write_run

SCRIPT = Path(__file__).resolve().parents[2] / "apps" / "sweep.py"
SCALED = "tests.backends.stateful_backend:ScaledBackend"
LR = {"sweep": "{optimizer.lr: [1e-3, 1e-4, 1e-2]}"}
Sweep = Callable[..., int]


@pytest.fixture
def given(settings: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The tiny run's settings as a sweep takes them."""
    mine = {name: value for name, value in settings.items() if name not in ("command", "training.output_dir")}
    return mine | {"output_dir": str(tmp_path / "sweep"), "compile.output_dir": str(tmp_path / "artifacts")}


@pytest.fixture
def sweep(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """`sweep(runner, {key: value})` in this process; a value of "" takes a setting away."""
    monkeypatch.setattr(planning, "in_own_process", lambda function, *arguments: function(*arguments))

    def start(runner: FakeRunner, changes: dict[str, str]) -> int:
        arguments = [f"{key}={value}" for key, value in (given | changes).items() if value]
        return run_main(lambda argv: program(argv, runner), arguments)

    return start


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_point_is_run_in_its_own_folder(sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = FakeRunner()
    assert sweep(runner, LR) == 0
    folders = [Path(run["training.output_dir"]).name for run in runner.ran]
    assert folders == ["lr=1e-3", "lr=1e-4", "lr=0.01"]
    assert {run["training.resume"] for run in runner.ran} == {"auto"}
    assert runner.compiled == []  # the eager twin has no artifact
    table = rows(tmp_path / "sweep")
    assert [(row["optimizer.lr"], row["dev_loss"], row["status"]) for row in table] == [
        ("1e-3", "2.001", "done"),
        ("1e-4", "2.0001", "done"),
        ("0.01", "2.01", "done"),
    ]
    assert [table[0][name] for name in ("train_loss", "parameters", "steps", "tokens", "seconds")] == [
        *("2.5", "34720", "2", "200", "1.0")
    ]
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " done " in line and "lr=" in line]
    assert shown == ["1e-4", "1e-3", "0.01"]  # the lowest dev loss first
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert "http" not in page
    assert "lr=1e-4/report.html" in page
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("axes", "runs", "compiles"),
    [
        ("{optimizer.lr: [1e-3, 1e-4], training.seed: [1, 2], training.token_budget: [N, 2*N]}", 8, 1),
        ("{model.dtype: [float32, float64], training.seed: [1, 2]}", 4, 2),
        (
            f"{{backend.default: [dense, '{SCALED}'], compile.head_chunks: [1, 2], optimizer.lr: [1e-3, 1e-4]}}",
            8,
            4,
        ),
        (f"{{backend.rules: {{dense: [], mlp: [{{match: '*.mlp.*', use: '{SCALED}', levels: 8}}]}}}}", 2, 2),
    ],
)
def test_each_distinct_step_is_compiled_once(sweep: Sweep, axes: str, runs: int, compiles: int) -> None:
    runner = FakeRunner()
    with_artifact = {"compile.target": "inductor", "training.max_steps": "null", "sweep": axes}
    assert sweep(runner, with_artifact) == 0
    assert (len(runner.ran), len(runner.compiled)) == (runs, compiles)
    commands = [next(word for word in words if word.startswith("command=")) for words in runner.words]
    assert commands == ["command=compile"] * compiles + ["command=run"] * runs  # before the first run


def test_model_sizes_are_a_sweep_too(
    sweep: Sweep, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = tmp_path / "larger"
    larger.mkdir()
    text = (tiny_model / "config.json").read_text()
    (larger / "config.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    runner = FakeRunner()
    axes = f"{{checkpoint.config_name: ['{tiny_model}', '{larger}'], training.token_budget: [22*N/100]}}"
    changes = {"checkpoint.config_name": "", "training.max_steps": "", "compile.target": "inductor"}
    assert sweep(runner, changes | {"sweep": axes}) == 0
    assert len(runner.compiled) == 2
    assert [int(row["parameters"]) for row in rows(tmp_path / "sweep")] == [34_720, 42_464]
    assert "config_name=larger_token_budget=22-N-100" in capsys.readouterr().out


def test_finished_runs_stay_and_a_failed_one_is_told_and_tried_again(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_once(run: dict[str, str], on_line: Callable[[str], None]) -> int:
        if run["optimizer.lr"] == "0.0001":
            on_line("Model: tiny\n")
            on_line("error: loss of step 3 is nan\n")
            return 1
        write_run(Path(run["training.output_dir"]), [2.0])
        return 0

    first, second = FakeRunner(fail_once), FakeRunner()
    assert sweep(first, LR) == 1
    assert len(first.ran) == 3  # the others were run all the same
    assert [row["status"] for row in rows(tmp_path / "sweep")] == ["done", "failed", "done"]
    assert rows(tmp_path / "sweep")[1]["error"] == "loss of step 3 is nan"
    assert "failed: lr=1e-4: loss of step 3 is nan" in capsys.readouterr().out
    assert sweep(second, LR) == 0
    assert [run["optimizer.lr"] for run in second.ran] == ["0.0001"]


def test_stop_on_error_leaves_the_rest_waiting(sweep: Sweep, tmp_path: Path) -> None:
    runner = FakeRunner(lambda run, on_line: 2)
    assert sweep(runner, LR | {"stop_on_error": "true"}) == 1
    assert [row["status"] for row in rows(tmp_path / "sweep")] == ["failed", "waiting", "waiting"]


def test_ctrl_c_ends_the_sweep_with_130_and_the_same_command_goes_on(sweep: Sweep, tmp_path: Path) -> None:
    def interrupted(run: dict[str, str], on_line: Callable[[str], None]) -> int:
        folder = Path(run["training.output_dir"])
        if folder.name == "lr=1e-3":
            write_run(folder, [2.0])
            return 0
        write_run(folder, [2.0], steps=10, dev_loss=None)  # as a run that was stopped leaves it, report and all
        os.kill(os.getpid(), signal.SIGINT)
        return 130

    first, second = FakeRunner(interrupted), FakeRunner()
    assert sweep(first, LR) == 130
    assert [row["status"] for row in rows(tmp_path / "sweep")] == ["done", "stopped", "waiting"]
    assert sweep(second, LR) == 0
    assert [Path(run["training.output_dir"]).name for run in second.ran] == ["lr=1e-4", "lr=0.01"]
    assert second.ran[0]["training.overwrite_output_dir"] == "true"  # what it left may be replaced


def test_a_sweep_may_grow_but_not_change(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(FakeRunner(), LR) == 0
    more = FakeRunner()
    assert sweep(more, {"sweep": "{optimizer.lr: [1e-3, 1e-4, 1e-2, 0.1]}"}) == 0
    assert [run["optimizer.lr"] for run in more.ran] == ["0.1"]
    other = FakeRunner()
    assert sweep(other, LR | {"training.max_steps": "9"}) == 2
    error = capsys.readouterr().err
    assert "was made with other settings" in error
    assert "training.max_steps | 4    | 9" in error
    assert not other.words


def test_a_launcher_stands_before_runs_only(sweep: Sweep) -> None:
    runner = FakeRunner()
    assert sweep(runner, LR | {"compile.target": "inductor", "launcher": "mpirun -np 2"}) == 0
    assert [words[:3] == ["mpirun", "-np", "2"] for words in runner.words] == [False, True, True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": "{optimizer.lr: [1e-3, fast]}"}, "Of lr=fast: Wrong value optimizer.lr=fast"),
        ({"sweep": "{optimizer.lrr: [1e-3, 1e-4]}"}, "Did you mean 'optimizer.lr'?"),
        (
            {"training.seed": "1", "sweep": "{training.seed: [1, 2]}"},
            "error: 'training.seed' is swept, and given as 1 too",
        ),
        ({"sweep": "{checkpoint.config_name: [dmo]}", "checkpoint.config_name": "demo"}, "swept, and given as demo"),
        (LR | {"training.batch_size": "0"}, "error: Wrong value training.batch_size=0"),
        ({"sweep": "{backend.rules: {a: [], b: [{match: nothing, use: dense}]}}"}, "Of rules=b: "),
        (
            {"sweep": "{model.max_seq_length: [32, 16]}", "model.max_seq_length": ""},
            "Of max_seq_length=16: This dataset (seq len 32)",
        ),
        (LR | {"training.dataset": "/no/such/place"}, "/no/such/place"),
        ({"sweep": "{training.token_budget: [N, N-1e9]}", "training.max_steps": "null"}, "it comes to"),
    ],
)
def test_one_bad_value_is_one_line_and_nothing_is_started(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    runner = FakeRunner()
    assert sweep(runner, changes) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not runner.words
    assert not (tmp_path / "sweep").exists()


def test_a_folder_of_somebody_else_is_left_alone(sweep: Sweep, tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "lr=1e-4", [1.0])
    runner = FakeRunner()
    assert sweep(runner, LR) == 2
    assert not runner.words


def test_it_is_not_started_by_a_launcher(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PMI_RANK": "0", "PMI_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("apps.training.workers.group.fail_before_opening", lambda launch, error: None)
    assert sweep(FakeRunner(), LR) == 2


def started(given: dict[str, str], **options: str) -> subprocess.CompletedProcess[str]:
    words = [warm_python.python(), str(SCRIPT), *(f"{key}={value}" for key, value in (given | options).items())]
    return subprocess.run(words, capture_output=True, text=True, timeout=570, check=False)


@pytest.mark.slow
def test_two_runs_for_real(given: dict[str, str], tmp_path: Path) -> None:
    axes = "{optimizer.lr: [1e-2, 1e-4]}"
    done = started(given, sweep=axes)
    assert done.returncode == 0, done.stdout + done.stderr
    high, low = rows(tmp_path / "sweep")
    assert float(high["dev_loss"]) < float(low["dev_loss"])
    assert (high["steps"], low["steps"]) == ("4", "4")
    assert (tmp_path / "sweep" / "lr=1e-4" / "model.safetensors").exists()
    again = started(given, sweep=axes)
    assert again.returncode == 0
    assert "2 runs, 2 of them done" in again.stdout


@pytest.mark.slow
def test_one_artifact_serves_both_runs(given: dict[str, str], tmp_path: Path) -> None:
    given |= {"compile.target": "inductor", "sweep": "{optimizer.lr: [1e-2, 1e-4]}"}
    done = started(given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 artifacts, 1 of them to compile" in done.stdout
    assert len(list((tmp_path / "artifacts").glob("*.substrate"))) == 1
    assert [row["status"] for row in rows(tmp_path / "sweep")] == ["done", "done"]
