"""plot_runs.py: what it reads, what it leaves, and what it says to a mistake."""

import re
from pathlib import Path

import pytest

from apps.plot_runs import plot
from apps.plotting.runs import read_curves
from apps.training.cli import run_main
from apps.training.reporting.output_folder import METRICS, MetricsFile
from apps.training.reporting.records import StepRecord

PNG = b"\x89PNG\r\n\x1a\n"


def a_run(folder: Path, losses: list[float], tokens: int = 10, seconds: float = 0.5) -> Path:
    folder.mkdir(parents=True)
    with MetricsFile(folder / METRICS) as metrics:
        for step, loss in enumerate(losses, 1):
            metrics.append(
                StepRecord(
                    step=step,
                    epoch=1,
                    loss=loss,
                    lr=0.1,
                    num_tokens=tokens,
                    num_counted=tokens,
                    seconds=seconds,
                    grad_norm=None,
                )
            )
    return folder


def test_two_runs_are_laid_over_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "runs/adamw", [4.0, 3.0, 3.5])
    a_run(tmp_path / "runs/muon <&>", [4.0, 2.0])
    folders = [str(tmp_path / "runs/adamw"), str(tmp_path / "runs/muon <&>")]
    assert run_main(plot, [*folders, f"output_dir={tmp_path}/plots"]) == 0
    assert (tmp_path / "plots/runs.png").read_bytes().startswith(PNG)
    page = (tmp_path / "plots/runs.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Loss against steps",
        "Loss against tokens",
        "Loss against seconds",
        "Runs",
    ]
    assert page.count('<polyline class="series0"') == page.count('<polyline class="series1"') == 3
    assert "muon &lt;&amp;&gt;" in page
    assert "<td>adamw</td><td>3</td><td>3.0000</td><td>3.5000</td><td>3.5000</td>" in page
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[1].split("|")] == ["adamw", "3", "3.0000", "3.5000", "3.5000"]
    assert lines[-1] == f"Pictures saved at {tmp_path}/plots/runs.png, {tmp_path}/plots/runs.html"


def test_a_loss_lies_where_its_steps_tokens_and_seconds_put_it(tmp_path: Path) -> None:
    (curve,) = read_curves([str(a_run(tmp_path / "one", [4.0, 3.0, 2.0], tokens=7, seconds=0.25))])
    assert curve.points("steps") == [(1.0, 4.0), (2.0, 3.0), (3.0, 2.0)]
    assert [x for x, _ in curve.points("tokens")] == [7.0, 14.0, 21.0]
    assert [x for x, _ in curve.points("seconds")] == [0.25, 0.5, 0.75]


def test_a_folder_of_runs_is_all_its_runs_each_once(tmp_path: Path) -> None:
    for name in ("lr1", "lr2"):
        a_run(tmp_path / "sweep" / name, [1.0])
    a_run(tmp_path / "other", [1.0])
    given = [str(tmp_path / "sweep"), str(tmp_path / "sweep/lr1"), str(tmp_path / "other")]
    assert [curve.label for curve in read_curves(given)] == ["sweep/lr1", "sweep/lr2", "other"]


def test_a_folder_that_is_there_is_a_folder_though_its_name_has_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path / "sweep/lr=1e-4", [2.0])
    a_run(tmp_path / "sweep/lr=1e-3,seed=1", [1.0])
    monkeypatch.chdir(tmp_path / "sweep")
    assert run_main(plot, [str(tmp_path / "sweep/lr=1e-4"), "lr=1e-3,seed=1", "output_dir=plots"]) == 0
    assert [line.split("|")[0].strip() for line in capsys.readouterr().out.splitlines()[1:3]] == [
        "lr=1e-4",
        "lr=1e-3,seed=1",
    ]
    assert run_main(plot, [str(tmp_path / "sweep/lr=1"), "output_dir=plots"]) == 2


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    path = a_run(tmp_path / "one", [4.0, 3.0, float("nan"), 2.0]) / METRICS
    path.write_bytes(path.read_bytes()[:-5])
    (curve,) = read_curves([str(tmp_path / "one")])
    assert curve.losses[:2] == [4.0, 3.0]
    assert len(curve.losses) == 3
    assert curve.facts[2] == "3.0000"  # what is not finite is not the best
    assert run_main(plot, [str(tmp_path / "one"), f"output_dir={tmp_path}/plots"]) == 0


def test_mistakes_are_one_line_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    a_run(tmp_path / "early", [])
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / METRICS).write_text("Step,Something\n1,2\n")
    output = f"output_dir={tmp_path}/plots"
    for arguments, said in (
        ([], "No run was named. Expected folders"),
        ([str(tmp_path / "empty")], "holds no run: it has no per_step_metrics.csv"),
        ([str(tmp_path / "early")], "No step was taken yet"),
        ([str(tmp_path / "strange")], "Expected the metrics of a run"),
        ([str(tmp_path / "empty"), "outputdir=x"], "Unknown setting 'outputdir'. Did you mean 'output_dir'?"),
    ):
        assert run_main(plot, [*arguments, output]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not (tmp_path / "plots").exists()
