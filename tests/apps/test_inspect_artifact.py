"""What a person sees of an artifact. Tracing is real here, machine code is not: nobody looks into it."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from apps import inspect_artifact
from apps.inspect_artifact import with_file
from apps.training.cli import run_main
from apps.training.step_plan import plan_step
from backends.errors import UserError
from compiled import build as building
from compiled.capture import Captured
from tests.apps.training.plans import SCALED, settings_of, write_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks, of which the third has a region of its own."""

    def lower_all(regions: dict[str, Captured], kind: str, folder: Path, *_: Any) -> None:
        for name in regions:
            (folder / name).write_bytes(f"code of {name}".encode())

    folder = tmp_path_factory.mktemp("artifact")
    model = write_config(folder / "tiny", num_hidden_layers=4)
    rule = f"backend.rules=[{{match: 'model.layers.2.mlp.*', use: '{SCALED}'}}]"
    plan = plan_step(settings_of(model, rule, "compile.head_chunks=4"))
    path = folder / "x.substrate"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "lower_all", lower_all)
        routing = plan.routing.to_json()
        path.write_bytes(building.build(plan.model, plan.spec, plan.optimizers, plan.precision, routing=routing))
    return path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_main(inspect_artifact.program, arguments) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr."""
    assert run_main(inspect_artifact.program, arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def section(text: str, title: str) -> list[list[str]]:
    """The rows of one titled table, in cells."""
    rows = text.split(f"{title}\n", 1)[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows]


def test_it_says_what_the_step_was_compiled_for(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(artifact))
    assert text.startswith(f"Artifact {artifact}\n")
    fields = dict(row for row in section(text, "Compiled for") if len(row) == 2)
    assert fields["batch_size"] == "2"
    assert fields["model.hidden_size"] == "32"
    assert fields["precision.parameters"] == "float32"
    assert fields["optimizer.name"] == "adamw"
    assert any("layers.2.mlp" in value for name, value in fields.items() if "ScaledBackend" in name)
    facts = dict(section(text, "Step"))
    assert facts["optimizer state"] == "exp_avg, exp_avg_sq"
    assert "lr" in facts["runtime numbers"].split(", ")


def test_it_says_which_backend_computes_which_layer(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = section(shown(capsys, str(artifact)), "Layers and backends")
    assert rows[0] == ["pattern", "backend", "count", "layers", "parameters", "FLOPs"]
    assert rows[1][:4] == ["model.layers.2.mlp.*", SCALED, "3", "model.layers.2.mlp.{gate,up,down}_proj"]
    assert ["(head, left alone)", "dense", "1", "lm_head"] in [row[:4] for row in rows]
    assert rows[-1] == ["Routed to other backends than dense: 3 of 33 layers."]


def test_it_lists_every_region(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ZipFile(artifact) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    rows = section(shown(capsys, str(artifact)), "Regions")
    assert [row[0] for row in rows[1:]] == list(manifest["regions"])


def test_the_schedule_folds_equal_neighbours(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = section(shown(capsys, str(artifact)), "Schedule")
    assert rows == [
        ["part", "forward", "backward", "update"],
        ["embed", "embed_forward", "embed_backward", "update_embed"],
        ["block 0 … 1", "block_0_forward", "block_0_backward", "update_0"],
        ["block 2", "block_1_forward", "block_1_backward", "update_0"],
        ["block 3", "block_0_forward", "block_0_backward", "update_0"],
        ["head", "head_train × 4", "(the same)", "update_head"],
    ]


def test_one_region_shows_inputs_outputs_and_graph(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(artifact), "region=head_train")
    rows = [line.split() for line in text.splitlines()]
    assert ["in", "labels", "int64", "[8]", "[1]"] in rows
    assert ["in", "sum_head.weight", "float32", "[96,", "32]", "[32,", "1]", "written", "in", "place"] in rows
    assert ["out", "loss", "float32", "[]", "[]"] in rows
    assert "torch.ops.aten.mm.default" in text
    assert "Compiled for" not in text


def test_extracting_writes_every_member_as_it_is(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, str(artifact), f"extract_dir={tmp_path / 'deep' / 'out'}")
    files = {
        path.relative_to(tmp_path / "deep" / "out").as_posix(): path for path in tmp_path.rglob("*") if path.is_file()
    }
    manifest = json.loads(files.pop("manifest.json").read_text())
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == manifest["members"]
    assert f"Extracted {len(files) + 1} files" in text


def test_extracting_over_a_folder_that_holds_something_is_refused(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert "is not empty. Name another folder." in refused(capsys, str(artifact), f"extract_dir={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_mistakes_are_one_line(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'head_train'?" in refused(capsys, str(artifact), "region=head_trian")
    assert "No artifact at" in refused(capsys, str(tmp_path / "none.substrate"))
    assert "file is missing" in refused(capsys)
    assert "Got 2 files (a, b)" in refused(capsys, "a", "b")
    assert "Did you mean 'region'" in refused(capsys, str(artifact), "regoin=x")
    truncated = tmp_path / "truncated.substrate"
    truncated.write_bytes(artifact.read_bytes()[:-100])
    assert "not a complete artifact" in refused(capsys, str(truncated))
    altered = bytearray(artifact.read_bytes())
    altered[altered.index(b"code of head_train")] ^= 1
    truncated.write_bytes(bytes(altered))
    assert "compile it again" in refused(capsys, str(truncated))


def test_a_bare_path_is_the_file_even_with_an_equals_sign(tmp_path: Path) -> None:
    strange = tmp_path / "lr=3.substrate"
    strange.write_text("")
    assert with_file([str(strange), "region=x"]) == [f"file={strange}", "region=x"]
    assert with_file(["plain", "--help"]) == ["file=plain", "--help"]
    assert with_file(["file=plain"]) == ["file=plain"]
    with pytest.raises(UserError, match="Expected one"):
        with_file(["a", str(strange)])


def test_it_starts_as_a_file_from_anywhere(artifact: Path, tmp_path: Path) -> None:
    script = str(ROOT / "apps" / "inspect_artifact.py")
    done = subprocess.run([sys.executable, script, str(artifact)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "block 0 … 1" in done.stdout
