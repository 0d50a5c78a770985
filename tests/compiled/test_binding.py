"""Regions bound to a model's tensors: picked by name, checked on their first run, state written back."""

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import pytest
import torch
from torch import Tensor

from backends.errors import UserError
from compiled.artifact import Artifact
from compiled.binding import Binding
from tests.compiled.conftest import Compiled


@pytest.fixture
def bound(tiny: Compiled) -> tuple[Any, Binding]:
    model = tiny.model()
    return model, Binding(tiny.artifact, model)


def test_a_part_reads_the_models_own_tensors(tiny: Compiled, bound: tuple[Any, Binding]) -> None:
    model, binding = bound
    entry = tiny.artifact.manifest["schedule"]["blocks"][1]
    inputs = binding.inputs(entry)
    assert inputs["mlp.up_proj.weight"] is model.model.layers[1].mlp.up_proj.weight
    assert inputs.keys() == dict(model.model.layers[1].named_parameters()).keys()


def test_a_region_takes_its_inputs_by_name_and_returns_outputs_by_name(bound: tuple[Any, Binding]) -> None:
    model, binding = bound
    ids = torch.arange(32).view(2, 16)
    unused = {"something_else": torch.zeros(1)}
    with torch.no_grad():
        outputs = binding.run("embed_forward", unused | {"input_ids": ids, "weight": model.model.embed_tokens.weight})
    assert torch.equal(outputs["output"], model.model.embed_tokens.weight[ids])


def test_the_first_run_is_checked_against_the_manifest_and_the_next_ones_are_not(tiny: Compiled) -> None:
    binding = Binding(tiny.artifact, tiny.model())
    checks = []
    region = binding.regions["embed_forward"]
    region.check = lambda tensors, device: checks.append(device)  # type: ignore[method-assign]
    tensors = {"input_ids": torch.zeros(2, 16, dtype=torch.int64), "weight": binding.tensors["lm_head.weight"].detach()}
    for _ in range(3):
        binding.run("embed_forward", tensors)
    assert checks == ["cpu"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), r"int64\[2, 16\].*got int64\[2, 8\]"),
        (torch.zeros(2, 16, dtype=torch.int32), r"int64\[2, 16\].*got int32\[2, 16\]"),
        (torch.zeros(16, 2, dtype=torch.int64).t(), r"int64\[2, 16\] stride \[16, 1\].*got .*stride \[1, 2\]"),
    ],
    ids=["shape", "dtype", "stride"],
)
def test_a_tensor_that_does_not_fit_is_refused(bound: tuple[Any, Binding], ids: Tensor, message: str) -> None:
    model, binding = bound
    with pytest.raises(UserError, match=rf"'embed_forward' expects input_ids as {message}"):
        binding.run("embed_forward", {"input_ids": ids, "weight": model.model.embed_tokens.weight.detach()})


def test_weights_of_another_shape_are_refused_by_the_region_that_reads_them(tiny: Compiled) -> None:
    model = tiny.model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(96, 64).double())
    binding = Binding(tiny.artifact, model)
    inputs = binding.inputs(tiny.artifact.manifest["schedule"]["head"])
    rest = {
        "hidden_states": torch.zeros(32, 32).double(),
        "labels": torch.zeros(32, dtype=torch.int64),
        "grad_scale": torch.zeros(32).double(),
    }
    with pytest.raises(UserError, match=r"expects head\.weight as float64\[96, 32\].*got float64\[96, 64\]"):
        binding.run("head_train", inputs | rest)


def test_input_dtypes_are_those_of_the_manifest(bound: tuple[Any, Binding]) -> None:
    assert bound[1].input_dtype("head_train", "labels") == torch.int64
    assert bound[1].input_dtype("head_train", "grad_scale") == torch.float64


def test_a_model_with_other_parameters_is_refused_before_machine_code_is_loaded(
    tiny: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Artifact, "load_regions", lambda self: pytest.fail("loaded"))
    model = tiny.model()
    model.model.layers[0].mlp.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match=r"unknown to it: \['model\.layers\.0\.mlp\.extra'\].*Compile again"):
        Binding(tiny.artifact, model)
    del model.model.layers[0].mlp.extra
    del model.model.layers[1]
    with pytest.raises(UserError, match=r"missing here: \['model\.layers\.1\.input_layernorm\.weight'"):
        Binding(tiny.artifact, model)


def test_loading_leaves_no_file_behind_and_refuses_code_altered_since_it_was_opened(
    tiny: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    Binding(tiny.artifact, tiny.model())
    assert list(folder.iterdir()) == []
    content = tiny.artifact.path.read_bytes()
    spec = tiny.artifact.region_specs()["embed_forward"]
    place = content.index(b"\x7fELF", content.index(spec.file.encode()))
    altered = tmp_path / "altered.substrate"
    altered.write_bytes(content[: place + 4] + bytes([content[place + 4] ^ 1]) + content[place + 5 :])
    with pytest.raises((UserError, BadZipFile), match="altered|CRC"):
        Artifact(altered, tiny.artifact.manifest).load_regions()
