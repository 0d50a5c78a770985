"""The table's rows: what they run and how they are written. Its run is among the commands of the README."""

from pathlib import Path

import pytest

from apps.training.config import parse
from apps.training.step_plan import plan_step
from benchmarks import speed_table
from benchmarks.speed_table import HEADING, ROOT, ROWS, chosen, chosen_peers, measured, table_lines


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_step_that_can_be_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = plan_step(parse(["command=compile", "compile.arch=cpu", *ROWS[name].settings.split()]))
    assert f"{plan.spec.batch_size}×{plan.spec.max_seq_length}" in ROWS[name].title or name == "cpu-bfloat16"
    assert plan.precision.parameters == ("float32" if name == "cpu" else "bfloat16")
    assert plan.precision.master == ("float32" if name.endswith("masters") else "none")
    assert plan.precision.rounding == ("split" if name == "llama-2-7b-masters" else "nearest")


def test_rows_are_those_asked_for_or_those_of_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert {row.kind for row in chosen("", "cpu")} == {"cpu"}
    assert len(chosen("", "cuda")) + len(chosen("", "cpu")) == len(chosen("all", "cpu")) == len(ROWS)
    assert chosen("long,clm-60m", "cpu") == [ROWS["long"], ROWS["clm-60m"]]
    with pytest.raises(SystemExit, match="'tiny' is unknown. Expected some of tinyllama, clm-60m"):
        chosen("long,tiny", "cuda")
    assert chosen_peers("", ROWS["tinyllama"]) == "eager,compile,liger"
    assert chosen_peers("liger", ROWS["tinyllama"]) == "liger"
    assert chosen_peers("none", ROWS["tinyllama"]) == chosen_peers("", ROWS["masters"]) == "none"


def test_a_table_tells_what_was_measured_and_what_was_left_out() -> None:
    speeds = {"median_ms": 209.14, "tokens_per_s": 78343, "mfu": 0.4, "of_floor": 0.887}
    lines = table_lines(
        "tiny",
        [
            {"variant": "substrate", **speeds, "peak_gib": 30.81},
            {"variant": "eager", **speeds, "times_ours": 1.46},
            {"variant": "liger", "left_out": "liger-kernel is not installed"},
        ],
    )
    assert lines == [
        ("tiny", "substrate", "78,343", "209.1", "", "40.0%", "88.7%", "30.8"),
        ("", "eager", "78,343", "209.1", "1.46", "40.0%", "88.7%", ""),
        ("", "liger: liger-kernel is not installed", *[""] * 6),
    ]
    assert table_lines("tiny", []) == [("tiny", "failed, see above", *[""] * 6)]
    assert {len(cells) for cells in lines} == {len(HEADING)}


def test_lines_are_taken_from_the_output_of_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "benchmarks" / "step_speed.py"
    script.parent.mkdir()
    script.write_text('import json, sys\nprint("Artifact: x")\nprint(json.dumps({"variant": sys.argv[1:]}))\n')
    monkeypatch.setattr(speed_table, "ROOT", tmp_path)
    assert list(measured(["a.b=1"], "none", "3")) == [{"variant": ["a.b=1", "peers=none", "steps=3"]}]
    assert "Artifact" not in capsys.readouterr().out
