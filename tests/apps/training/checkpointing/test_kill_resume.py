"""A run killed in the middle of a step and in the middle of saving ends as if it had been left alone."""

from pathlib import Path

import pytest

from benchmarks.kill_resume import compare, run_killed, run_whole


@pytest.mark.slow
def test_two_kills_and_the_same_run(settings: dict[str, str], tmp_path: Path) -> None:
    given = settings | {"training.max_steps": "40", "checkpoint.save_steps": "3", "training.eval_steps": "10"}
    del given["command"], given["training.output_dir"]
    arguments = [f"{name}={value}" for name, value in given.items()]
    whole = run_whole([], arguments, tmp_path / "whole")
    kills = list(run_killed([], arguments, tmp_path / "killed", kills=2, seed=1, whole=whole))
    assert not any(kill["ended_before"] for kill in kills)
    assert any(kill["goes_on_after"] for kill in kills)
    compare(whole, tmp_path / "killed")  # SystemExit where anything differs
