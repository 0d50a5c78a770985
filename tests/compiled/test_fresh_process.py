"""`command=run` compiles nothing: a bare process without a compiler, caches or a writable home takes the first step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.compiled.conftest import Compiled

ROOT = Path(__file__).resolve().parents[2]

# What the process does between opening the artifact and the end of its first step, with every door watched.
SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
import modelzoo
from compiled.artifact import open_artifact
from compiled.program import CompiledProgram

path, batch_path, config = sys.argv[1:]
started_processes = []
doors = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
sys.addaudithook(lambda event, arguments: started_processes.append(event) if event in doors else None)

model = modelzoo.build_model(modelzoo.load_config(config_name=config), dtype="float64", seed=1)
batch, hyper = torch.load(batch_path)
begin = time.perf_counter()
program = CompiledProgram(open_artifact(Path(path)), model, moments_dtype=torch.float64, master_dtype=None)
loss = program.train_step([batch], hyper, None).loss.item()
seconds = time.perf_counter() - begin
import torch._dynamo
print(json.dumps({
    "loss": loss,
    "seconds": seconds,
    "processes": started_processes,
    "frames": sum(torch._dynamo.utils.counters["frames"].values()),
    "inductor": sum(torch._dynamo.utils.counters["inductor"].values()),
    "compiler_imported": "torch._inductor.compile_fx" in sys.modules,
}))
"""


def test_the_first_step_of_a_bare_process(tiny: Compiled, tmp_path: Path) -> None:
    model = tiny.model()
    batch, hyper = tiny.batch(1), tiny.hyperparameters(model, 1)
    torch.save((batch, hyper), tmp_path / "batch.pt")
    model.config.to_json_file(tmp_path / "zoo.json")
    config = tmp_path / "config"
    config.mkdir()
    fields = json.loads((tmp_path / "zoo.json").read_text()) | {"model_type": "llama"}
    (config / "config.json").write_text(json.dumps({key: fields[key] for key in fields if "dtype" not in key}))
    temporary, nothing, cache = tmp_path / "tmp", tmp_path / "empty", tmp_path / "cache"
    for folder in (temporary, nothing, cache):
        folder.mkdir()

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny.artifact.path), str(tmp_path / "batch.pt"), str(config)],
        cwd=ROOT,
        env={
            "PATH": str(nothing),  # no compiler, no shell
            "HOME": "/proc/self/nowhere",  # cannot be written, whoever we are
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TMPDIR": str(temporary),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    expected = tiny.program(model).train_step([batch], hyper, None)
    assert told["loss"] == expected.loss.item()
    assert told["processes"] == []
    assert told["frames"] == told["inductor"] == 0
    assert not told["compiler_imported"]
    assert list(cache.iterdir()) == []
    assert told["seconds"] <= 1.5
    assert list(temporary.iterdir()) == []  # the machine code it unpacked is gone again
