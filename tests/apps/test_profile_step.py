"""The profile of a small step on the CPU, from the command line to the table and the trace; and its errors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from apps import profile_step
from apps.training.cli import run_main
from tests.compiled.conftest import Compiled, compile_step, plan_of, tiny, tiny_config  # noqa: F401  (fixtures)


@pytest.fixture
def settings(tiny: Compiled, tiny_config: Any, tmp_path: Path) -> list[str]:  # noqa: F811
    """Of the step that the tests of the compile room share."""
    shape = ["training.batch_size=2", "model.max_seq_length=16", "compile.arch=cpu", "model.dtype=float64"]
    return [
        f"checkpoint.config_name={tiny_config()}",
        *shape,
        f"run.artifact={tiny.artifact.path}",
        f"trace={tmp_path}/made/trace.json",
    ]


def test_every_region_of_the_schedule_has_a_row_and_the_rows_add_up_to_the_step(
    settings: list[str],
    tiny: Compiled,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(profile_step.program, [*settings, "steps=2"]) == 0
    out = capsys.readouterr().out
    lines = out[out.index("region ") :].split("\n\n")[0].splitlines()
    calls = {line.split()[0]: line.split()[1] for line in lines[1:-2]}
    schedule = tiny.artifact.manifest["schedule"]
    (forward,) = {block["forward"] for block in schedule["blocks"]}
    assert calls[forward] == "2"
    assert calls["head_train"] == str(schedule["head"]["chunks"])
    assert set(calls) == {
        *(schedule["embed"][way] for way in ("forward", "backward")),
        *(block[way] for block in schedule["blocks"] for way in ("forward", "backward")),
        "head_train",
        *(group["direct"] for group in schedule["updates"]),
    }
    *parts, step = (float(re.search(r"(\d+\.\d{3})", line)[1]) for line in lines[1:])  # type: ignore[index]
    assert sum(parts) == pytest.approx(step, abs=0.001 * len(parts))
    assert re.search(r"Floor of a region: .*FLOP/s", out)
    names = [event["name"] for event in json.loads((tmp_path / "made/trace.json").read_text())["traceEvents"]]
    assert names.count("train step") == 2
    assert names.count(f"region {forward}") == 4
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["trace.json"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["compile.target=eager"], "compile.target=eager has no regions to profile."),
        (["run.artifact=nowhere.substrate"], "No artifact at 'nowhere.substrate'."),
        (["stesp=2"], "steps"),
        (["steps=0"], "at least 1"),
    ],
)
def test_mistakes_are_one_line(
    settings: list[str], changes: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    keys = {change.partition("=")[0] for change in changes}
    kept = [each for each in settings if each.partition("=")[0] not in keys]
    assert run_main(profile_step.program, [*kept, *changes]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "made").exists()
