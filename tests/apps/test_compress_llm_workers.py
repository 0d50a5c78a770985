"""compress_llm among several workers: what it tells those who watch over them."""

import sys
from pathlib import Path
from typing import NoReturn

import pytest

from apps.compress_llm import main
from apps.training.workers import group
from backends.errors import UserError


def test_the_watch_names_this_programs_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}

    def open_workers(launch: object, **options: object) -> NoReturn:
        given.update(options)
        raise UserError("Enough.")

    monkeypatch.setattr(group, "open_workers", open_workers)
    settings = ["checkpoint.model_name_or_path=DIR", "compress.keep=0.5", "device=cpu", "worker_timeout=7"]
    monkeypatch.setattr(sys, "argv", ["compress_llm.py", *settings, f"output_dir={tmp_path / 'low'}"])
    assert main() == 2
    assert capsys.readouterr().err == "error: Enough.\n"
    assert (given["timeout"], given["setting"]) == (7.0, "worker_timeout")
