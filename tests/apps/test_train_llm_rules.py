"""A run with a rules file, from end to end: every layer where the file says, and all of it told and stored."""

from html import unescape
from pathlib import Path

import pytest
import yaml

from apps.train_llm import program
from apps.training.cli import run_main

TABLE = [
    ("* (attention)", "optical(q_levels=64)", "2", "model.layers.{0-1}.self_attn"),
    ("* (linear)", "optical", "14", "model.layers.{0-1}.self_attn.{q,k,v,o}_proj"),
    ("", "", "", "model.layers.{0-1}.mlp.{gate,up,down}_proj"),
    ("(head, left alone)", "dense", "1", "lm_head"),
]


def run(settings: dict[str, str], **changes: str | None) -> None:
    changed = settings | {key.replace("__", "."): value for key, value in changes.items()}
    assert run_main(program, [f"{key}={value}" for key, value in changed.items() if value is not None]) == 0


def assert_tells_the_table(text: str) -> None:
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:3] == ["pattern", "backend", "count"])
    for line, cells in zip(lines[start + 1 :], TABLE, strict=False):
        shown = [cell for cell in cells if cell]
        assert [cell.strip() for cell in line.split("  ") if cell.strip()][: len(shown)] == shown
    assert lines[start + 5] == "Routed to other backends than dense: 16 of 17 layers."


def test_a_run_with_a_rules_file_tells_stores_and_repeats_itself_without_the_file(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text("use_lora = false\n[attention]\nq_levels = 64\n[fc]\nq_smooth_factor = 0.9\n")
    run(settings, backend__rules_file="my.toml")
    assert_tells_the_table(capsys.readouterr().out)
    out = Path(settings["training.output_dir"])
    assert_tells_the_table((out / "summary.txt").read_text())
    page = unescape((out / "report.html").read_text())
    assert_tells_the_table(
        page[page.index('<pre class="table">') :].replace('<pre class="table">', "").split("</pre>")[0]
    )

    stored = yaml.safe_load((out / "config.yaml").read_text())["backend"]
    assert stored["rules_file"] is None
    assert [(rule["only"], rule.get("q_levels")) for rule in stored["rules"]] == [("attention", 64), ("linear", None)]

    Path("my.toml").unlink()
    again = {"command": "run", "config": str(out / "config.yaml"), "training.output_dir": str(tmp_path / "again")}
    run(again)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_rules_decide_the_numbers(settings: dict[str, str], tmp_path: Path) -> None:
    """The same settings but for the rules: another model comes out."""
    short = {"training.max_steps": "2", "training.evaluate": "false"}
    weights = []
    for name in ("optical", "optical-4bit"):
        run(settings | short, training__output_dir=str(tmp_path / name), backend__rules_file=name)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]
