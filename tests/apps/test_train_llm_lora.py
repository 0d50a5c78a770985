"""Runs that train low-rank updates: what they leave, that they go on exactly, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from apps.merge_lora import merge
from apps.training.cli import run_main
from tests.apps.test_train_llm import losses, run

LORA = {"lora.r": "4", "lora.alpha": "16", "optimizer.lr": "1e-2", "training.evaluate": "false"}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def error_of(settings: dict[str, str], capsys: pytest.CaptureFixture[str], **changes: str) -> str:
    capsys.readouterr()
    assert run(settings, **changes) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def base(settings: dict[str, str], tmp_path: Path) -> Path:
    """A model folder with weights and tokenizer."""
    out = tmp_path / "base"
    assert run(settings, training__max_steps="1", training__output_dir=str(out), training__evaluate="false") == 0
    return out


@pytest.fixture
def on_base(settings: dict[str, str], base: Path) -> dict[str, str]:
    given = {key: value for key, value in settings.items() if key != "checkpoint.config_name"}
    return given | LORA | {"checkpoint.model_name_or_path": str(base)}


def test_a_run_leaves_the_merged_model_and_its_adapter(
    on_base: dict[str, str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = tmp_path / "out", weights(base)
    assert run(on_base) == 0
    printed = capsys.readouterr().out
    assert "of them trained: LoRA of rank 4, alpha 16, in 14 layers" in printed
    assert f"Adapter saved at {out / 'adapter'}/" in printed
    assert losses(out)[-1] < losses(out)[0]
    after = weights(out)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    factors = load_file(out / "adapter" / "adapter_model.safetensors")
    for name in changed:
        path = f"base_model.model.{name.removesuffix('.weight')}"
        update = factors[f"{path}.lora_B.weight"].double() @ factors[f"{path}.lora_A.weight"].double()
        torch.testing.assert_close(after[name].double(), before[name].double() + 4 * update, rtol=0, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    arguments = [f"checkpoint.model_name_or_path={base}", f"lora.adapter={out / 'adapter'}"]
    assert run_main(merge, [*arguments, f"output_dir={tmp_path / 'merged'}"]) == 0
    assert equal(weights(tmp_path / "merged"), after)
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert run_main(merge, [*arguments, f"output_dir={base}"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_merging_looks_at_its_output_folder_first(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["checkpoint.model_name_or_path=/nowhere", "lora.adapter=/nowhere", "output_dir=/proc/merged"]
    assert run_main(merge, given) == 2
    assert "Cannot write output_dir=/proc/merged: " in capsys.readouterr().err


def test_without_merging_only_the_adapter_is_written(on_base: dict[str, str], tmp_path: Path) -> None:
    assert run(on_base, lora__merge="false", lora__match="[q_proj, v_proj]", lora__train_norms="true") == 0
    out = tmp_path / "out"
    assert not list(out.glob("*.safetensors"))
    assert not (out / "config.json").exists()
    assert (out / "report.html").exists()
    assert len(load_file(out / "adapter" / "adapter_model.safetensors")) == 2 * 2 * 2 + 5


def test_a_run_goes_on_from_an_adapter_as_from_the_merged_model(on_base: dict[str, str], tmp_path: Path) -> None:
    assert run(on_base) == 0
    once = {"training__max_steps": "1"}
    adapter = {key: value for key, value in on_base.items() if key not in ("lora.r", "lora.alpha")}
    adapter["lora.adapter"] = str(tmp_path / "out" / "adapter")
    assert run(adapter, training__output_dir=str(tmp_path / "on"), **once) == 0
    merged = on_base | {"checkpoint.model_name_or_path": str(tmp_path / "out")}
    assert run(merged, training__output_dir=str(tmp_path / "anew"), **once) == 0
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "anew"), rel=1e-6)


@pytest.mark.parametrize("kind", ["random", "folder"])
def test_a_stopped_run_ends_with_the_same_bits(
    kind: str, settings: dict[str, str], on_base: dict[str, str], tmp_path: Path
) -> None:
    given = (settings | LORA if kind == "random" else on_base) | {"model.dtype": "bfloat16"}
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert run(given, training__output_dir=whole) == 0
    saving = given | {"checkpoint.save": "true", "training.resume": "auto", "training.output_dir": parts}
    assert run(saving, checkpoint__num_steps="2") == 0
    folder = tmp_path / "parts" / "checkpoints" / "iter_2"
    assert not (folder / "config.json").exists()  # nobody shall take it for a model
    saved = load_file(folder / "trained.safetensors")
    assert len(saved) == 28
    assert all(name.endswith(("lora_A", "lora_B")) for name in saved)
    optimizer = load_file(folder / "optimizer-00001-of-00001.safetensors")
    owners = {name.removeprefix("optimizer.").rpartition(".")[0] for name in optimizer if name.startswith("optimizer.")}
    assert owners == saved.keys()
    assert run(saving) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_changed_base_and_another_rank_are_refused(
    on_base: dict[str, str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = on_base | {"checkpoint.save": "true", "checkpoint.num_steps": "2"}
    assert run(saving) == 0
    again = saving | {"training.resume": "auto"}
    capsys.readouterr()
    assert run(again, lora__r="8", checkpoint__overwrite_config="true") == 2
    assert "lora.r" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1e-3
    model.save_pretrained(base)
    assert "the base model has changed since" in error_of(again, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.r": "40"}, "LoRA has r=40, more than the smaller side of layer 'model.layers.0.self_attn.q_proj'"),
        ({"lora.r": "4", "lora.match": "[qproj]"}, "LoRA's pattern 'qproj' names no linear layer"),
        ({"lora.train_norms": "true"}, "lora.train_norms was given, but lora.r=0"),
        ({"lora.r": "-1"}, "Wrong value lora.r=-1"),
        ({"lora.adapter": "nowhere"}, "There is no adapter folder 'nowhere'"),
        ({"lora.rank": "4"}, "lora.rank"),
        ({"use_lora": "true"}, "lora.r"),
    ],
)
def test_a_mistake_is_one_line(
    changes: dict[str, str], message: str, settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(settings | changes, capsys)
    assert not (tmp_path / "out").exists()


def test_an_adapter_says_its_own_rank_and_layers(
    on_base: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(on_base, training__max_steps="1", lora__match="[q_proj]", lora__train_norms="true") == 0
    again = {key: value for key, value in on_base.items() if not key.startswith("lora.")}
    again |= {"lora.adapter": str(tmp_path / "out" / "adapter"), "training.output_dir": str(tmp_path / "new")}
    assert "lora.r=8 was given" in error_of(again, capsys, lora__r="8")
    assert "lora.match=['k_proj'] was given" in error_of(again, capsys, lora__match="[k_proj]")
    assert "go on with lora.train_norms=true" in error_of(again, capsys)
    assert run(again, lora__train_norms="true", training__max_steps="1") == 0
