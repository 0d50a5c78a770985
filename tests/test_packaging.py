"""The wheel holds all of the project, and every program starts fast from anywhere."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("apps", "backends", "compiled", "modelzoo")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROGRAMS = tuple(PROJECT["scripts"])


def test_the_wheel_holds_every_source_and_data_file(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, sources)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    expected = {
        str(path.relative_to(sources)) for name in PACKAGES for path in (sources / name).rglob("*") if path.is_file()
    }
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=sources, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("substrate-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert expected - held == set()
    assert {name for name in held if ".dist-info/" not in name} - expected == set()


def test_every_program_is_a_console_script() -> None:
    programs = {path.stem for path in (ROOT / "apps").glob("*.py")} - {"__init__"}
    assert PROJECT["scripts"] == {name: f"apps.{name}:main" for name in programs}


def test_dependencies_are_bounded() -> None:
    assert [line for line in PROJECT["dependencies"] if "<" not in line or ">=" not in line] == []


@pytest.mark.parametrize("folder", [".", "apps"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_help_starts_from_anywhere_within_half_a_second_of_cpu(name: str, folder: str) -> None:
    script = (ROOT / "apps" / f"{name}.py").relative_to(ROOT / folder)
    before = os.times()
    shown = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=ROOT / folder, check=True, capture_output=True, text=True
    )
    after = os.times()
    assert shown.stdout.startswith(f"usage: {name}")
    assert shown.stderr == ""
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_and_mistakes_need_no_torch(name: str) -> None:
    program = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    print('code', stop.code)\n"
        "print('torch' in sys.modules)"
    )
    for argument, code in (("--help", 0), ("nonsense=1", 2)):
        command = [sys.executable, "-c", program, f"apps/{name}.py", argument]
        ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        assert ended.stdout.splitlines()[-2:] == [f"code {code}", "False"]
        assert len(ended.stderr.splitlines()) == (0 if code == 0 else 1)
