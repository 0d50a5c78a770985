"""`command=compile` as a person meets it: refused before the work, or one file and what there is to know of it."""

from pathlib import Path
from typing import Any

import pytest

from apps import train_llm
from apps.training import compile_command
from apps.training.cli import run_main
from apps.training.compile_command import compile_artifact, region_table, summary
from apps.training.step_plan import plan_step
from compiled import build as building
from compiled.artifact import open_artifact
from compiled.capture import Captured
from tests.apps.training.plans import settings_of, write_config


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    shape = ["training.batch_size=2", "model.max_seq_length=16", "compile.arch=cpu"]
    model = write_config(tmp_path / "tiny")
    return ["command=compile", f"checkpoint.config_name={model}", f"compile.output_dir={tmp_path / 'out'}", *shape]


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Machine code is a word and takes no time; the list holds the `workers` and `debug` each call was given."""
    calls = []

    def lower_all(
        regions: dict[str, Captured], kind: str, folder: Path, workers: Any, debug: Any, report: Any, *_: Any
    ) -> None:
        calls.append((workers, debug))
        for done, (name, region) in enumerate(regions.items(), 1):
            (folder / name).write_bytes(b"code")
            region.spec.kernels, region.spec.seconds = 3, 1.25
            report(region.spec, done, len(regions))

    monkeypatch.setattr(building, "lower_all", lower_all)
    return calls


def test_one_file_appears_with_its_summary(
    arguments: list[str], without_compiler: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(train_llm.program, [*arguments, "compile.workers=2"]) == 0
    (file,) = (tmp_path / "out").iterdir()
    assert open_artifact(file).spec["batch_size"] == 2
    told = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines() if ":" in line)
    assert told["Artifact"].strip() == str(file)
    assert told["Distinct regions"].strip() == "9 for 2 blocks"
    assert told["Parameters"].strip() == f"{open_artifact(file).manifest['parameters']:,}"
    assert "per token" in told["FLOPs per step"]
    assert {"Size", "Compile time", "Expected memory", "Bytes per step"} <= told.keys()
    assert without_compiler == [(2, None)]


@pytest.mark.usefixtures("without_compiler")
def test_verbose_prints_a_row_for_each_region(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(train_llm.program, arguments) == 0
    assert "graph nodes" not in capsys.readouterr().out
    assert run_main(train_llm.program, [*arguments, "compile.verbose=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heading = next(index for index, line in enumerate(lines) if line.startswith("region"))
    rows = [line.split() for line in lines[heading + 1 : heading + 9]]
    assert [row[0] for row in rows][:4] == ["embed_forward", "embed_backward", "block_0_forward", "block_0_backward"]
    assert all(row[-3:-1] == ["3", "1.2"] for row in rows)  # kernels, seconds


@pytest.mark.usefixtures("without_compiler")
def test_the_tables_say_what_the_manifest_says(tmp_path: Path) -> None:
    config = settings_of(write_config(tmp_path / "tiny"), f"compile.output_dir={tmp_path / 'out'}")
    plan = plan_step(config)
    artifact = compile_artifact(config, plan)
    table = region_table(artifact).splitlines()
    assert len(table) == 1 + len(artifact.manifest["regions"])
    for line, (name, region) in zip(table[1:], artifact.region_specs().items(), strict=True):
        cells = line.split()
        assert cells[:4] == [name, str(region.nodes), str(len(region.inputs)), str(len(region.outputs))]
        assert cells[-1] == region.sha256[:8]
    assert f"{artifact.manifest['parameters']:,}" in summary(artifact, plan)


@pytest.mark.parametrize("under_a_file", [False, True], ids=["a file", "under a file"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    arguments: list[str],
    tmp_path: Path,
    under_a_file: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compile_command, "build", lambda *_, **__: pytest.fail("compiled first"))
    (tmp_path / "out").write_text("in the way")
    if under_a_file:
        arguments[2] += "/deeper/still"
    assert run_main(train_llm.program, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Cannot write compile.output_dir=")
    assert line.endswith("Choose another folder.")


def test_a_place_where_even_root_may_write_nothing_is_refused_before_the_work(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_command, "build", lambda *_, **__: pytest.fail("compiled first"))
    assert run_main(train_llm.program, [*arguments[:2], "compile.output_dir=/proc/new", *arguments[3:]]) == 2
    assert "compile.output_dir=/proc/new" in capsys.readouterr().err


@pytest.mark.usefixtures("without_compiler")
def test_nothing_is_left_when_compiling_fails(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "lower_all", fail)
    assert run_main(train_llm.program, arguments) == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_compiler")
def test_an_earlier_artifact_of_the_same_step_is_replaced(arguments: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        assert run_main(train_llm.program, arguments) == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_debug_keeps_graphs_and_generated_code_beside_the_artifact(
    arguments: list[str], without_compiler: list[Any], tmp_path: Path
) -> None:
    """The compiler is told the folder; what it keeps there is tested with the compiler, in test_lowering."""
    assert run_main(train_llm.program, [*arguments, "compile.debug=true"]) == 0
    (file,) = (tmp_path / "out").glob("*.substrate")
    debug = file.with_suffix(".debug")
    assert without_compiler == [(None, debug)]
    for name in open_artifact(file).region_specs():
        assert "def forward(self" in (debug / "graphs" / f"{name}.txt").read_text()


@pytest.mark.usefixtures("without_compiler")
def test_progress_counts_regions_where_it_is_wanted(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(train_llm.program, [*arguments, "logging.progress=on"]) == 0
    assert "Compiling 1/9 regions" in capsys.readouterr().err
    assert run_main(train_llm.program, [*arguments, "logging.progress=off"]) == 0
    assert capsys.readouterr().err == ""
