"""The artifact of compile.target=mlir: modules, what the manifest says of them, and how a person gets them out."""

import hashlib
import json
import re
from pathlib import Path
from zipfile import ZipFile

import pytest

from apps import inspect_artifact, train_llm
from apps.training.cli import run_main
from compiled.artifact import open_artifact, read_member
from compiled.mlir.modules import ModuleSpec

pytest.importorskip("torch_mlir", reason="the extra [mlir] is not installed")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_config: object) -> Path:
    """Compiled as a user does, without a compiler behind it."""
    folder = tmp_path_factory.mktemp("mlir")
    config = tiny_config(num_hidden_layers=3)  # type: ignore[operator]
    settings = [f"checkpoint.config_name={config}", f"compile.output_dir={folder}", "compile.mlir.compiler=none"]
    settings += ["training.batch_size=2", "model.max_seq_length=16", "compile.mlir.whole_step=true"]
    assert run_main(train_llm.program, ["command=compile", "compile.target=mlir", "optimizer=sgdm", *settings]) == 0
    (file,) = folder.glob("*.substrate")
    return file


def test_every_region_is_a_module_and_the_step_is_one_more(artifact: Path) -> None:
    opened = open_artifact(artifact)
    about = opened.manifest["mlir"]
    assert about["dialect"] == opened.spec["target"]["dialect"] == "linalg"
    assert about["modules"].keys() == {*opened.manifest["regions"], "step"}
    for name, entry in about["modules"].items():
        module = ModuleSpec.from_json(entry)
        assert module.to_json() == json.loads(json.dumps(entry)) | module.to_json()
        content = read_member(opened, module.file)
        assert (module.bytes, module.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert f"func.func @{module.function}(".encode() in content
        region = opened.region_specs().get(name)
        if region is None:
            continue
        assert [(each.name, each.dtype, each.shape) for each in module.arguments] == [
            (each.name, each.dtype, each.shape) for each in region.inputs
        ]
        written = [f"new_{each}" for each in region.mutated]
        assert [each.name for each in module.results] == [*(each.name for each in region.outputs), *written]
        assert [module.arguments[argument].name for argument, _ in module.donations] == region.mutated
        assert [module.results[result].name for _, result in module.donations] == written
        assert all(each.role in ("moment", "parameter") for each in module.results[len(region.outputs) :])


def test_roles_are_those_of_the_schedule(artifact: Path) -> None:
    modules = {
        name: ModuleSpec.from_json(entry) for name, entry in open_artifact(artifact).manifest["mlir"]["modules"].items()
    }
    roles = {name: {each.name: each.role for each in module.arguments} for name, module in modules.items()}
    block = roles["block_0_backward"]
    assert block["self_attn.q_proj.weight"] == "parameter"
    assert block["grad_output"] == "gradient"
    assert block["cos"] == "table"
    assert block["saved_0"] == "activation"
    assert roles["head_train"] | {"hidden_states": ""} == {
        "norm.weight": "parameter",
        "head.weight": "parameter",
        "hidden_states": "",
        "labels": "batch",
        "grad_scale": "batch",
    }
    update = roles["update_0"]
    assert update["hyperparameters"] == update["grad_coef"] == "hyper-parameter"
    assert {role for name, role in update.items() if name.startswith("momentum")} == {"moment"}


def test_the_modules_come_out_as_text_and_as_bytecode(artifact: Path, tmp_path: Path) -> None:
    assert run_main(inspect_artifact.program, [str(artifact), "--mlir", str(tmp_path / "text")]) == 0
    assert run_main(inspect_artifact.program, [str(artifact), f"mlir={tmp_path / 'code'}", "mlir_format=bytecode"]) == 0
    with ZipFile(artifact) as archive:
        members = {Path(name).stem for name in archive.namelist() if name.startswith("mlir/")}
    assert {path.stem for path in (tmp_path / "text").glob("*.mlir")} == members
    assert {path.stem for path in (tmp_path / "code").glob("*.mlirbc")} == members
    for name in members:
        assert (tmp_path / "code" / f"{name}.mlirbc").read_bytes()[:4] == b"ML\xefR"
        assert re.match(r"(#map.*\n)*module", (tmp_path / "text" / f"{name}.mlir").read_text())
    assert json.loads((tmp_path / "text" / "modules.json").read_text()) == open_artifact(artifact).manifest["mlir"]
