"""On a GPU: the artifact knows the floor, a run says it, and the profile sees kernels of every region."""

import json
import re
from pathlib import Path

import pytest
import torch

from apps import profile_step, train_llm
from apps.profiling.names import BETWEEN
from apps.profiling.trace import Part, read_trace
from apps.training.cli import run_main
from compiled.artifact import open_artifact
from tests.apps.training.plans import write_config

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_compile_run_and_profile(tmp_path: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"hidden_size": 256, "intermediate_size": 384, "vocab_size": 300, "max_position_embeddings": 128}
    settings = [
        f"checkpoint.config_name={write_config(tmp_path / 'tiny', **fields)}",
        f"compile.output_dir={tmp_path}/artifacts",
        *("model.max_seq_length=32", "training.batch_size=8", "model.dtype=bfloat16", "compile.arch=cuda"),
    ]
    assert run_main(train_llm.program, ["command=compile", *settings]) == 0
    assert re.search(r"Floor: +\d+\.\d ms, ", capsys.readouterr().out)
    (path,) = (tmp_path / "artifacts").iterdir()
    manifest = open_artifact(path).manifest
    assert manifest["floor"]["device"] == torch.cuda.get_device_name()
    assert 0 < manifest["floor"]["update_seconds"] < 1e-2 > manifest["floor"]["microbatch_seconds"] > 0

    run = [f"training.dataset={tiny_dataset}", "training.max_steps=3", f"training.output_dir={tmp_path}/out"]
    assert run_main(train_llm.program, ["command=run", *settings, *run]) == 0
    assert re.search(r"Model FLOP/s: .*% of the floor", capsys.readouterr().out)

    trace = tmp_path / "trace.json"
    assert run_main(profile_step.program, [*settings, f"trace={trace}"]) == 0
    profile = read_trace(trace)
    assert profile.on_gpu
    parts = {part.name: part for part in profile.parts}
    schedule = manifest["schedule"]
    wanted = {schedule["head"]["train"], *(block["backward"] for block in schedule["blocks"])}
    wanted |= {schedule["embed"]["forward"], *(group["direct"] for group in schedule["updates"])}
    assert wanted <= parts.keys()
    assert all(parts[name].kernels for name in wanted)
    assert sum(part.seconds for part in profile.parts) + profile.idle == pytest.approx(profile.seconds)
    # what lies between regions is copies of a few numbers
    between = parts.pop(BETWEEN, Part(BETWEEN))
    assert between.busy < sum(part.busy for part in parts.values())
    assert any(event.get("cat") == "kernel" for event in json.loads(trace.read_text())["traceEvents"])
