"""The commands of docs/low-rank.md have settings that exist, and the study of the methods runs, goes on and is told."""

import json
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from apps.compression.settings import CompressSettings
from apps.training.config import parse, parse_dataclass
from apps.training.data.options import PrepareOptions
from benchmarks import low_rank_report
from tests import warm_python

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(
    r"^```text\n(.*?)^```", (ROOT / "docs/low-rank.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words[1:3]) for words in COMMANDS])
def test_a_command_parses(words: list[str]) -> None:
    python, script, *settings = words
    assert python == "python"
    if script.startswith("benchmarks/"):
        own = import_module(f"benchmarks.{Path(script).stem}").OWN
        rest = [each for each in settings if each.split("=")[0] not in own]
        assert parse(["command=compile", *rest])
    elif script == "apps/compress_llm.py":
        given = ["expand=true" if each == "--expand" else each for each in settings]
        assert parse_dataclass(CompressSettings, given, program=script)
    elif script == "apps/prepare_data.py":
        assert parse_dataclass(PrepareOptions, settings, program=script)
    else:
        assert script == "apps/train_llm.py"
        assert parse(settings).command in ("compile", "run")


@pytest.fixture(scope="module")
def tiny_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of a Llama of 2 layers."""
    folder = tmp_path_factory.mktemp("tiny-shape")
    config = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_table_marks_the_lowest_and_says_what_was_lost(tmp_path: Path) -> None:
    figures = {("dense", "", ""): (10.0, 9.0), ("svd", "uniform", "0.6"): (5e4, 40.0)}
    figures |= {("svd", "spectrum", "0.6"): (30.0, 11.0), ("mimic", "uniform", "0.6"): (12.5, 11.5)}
    figures |= {("mimic", "spectrum", "0.6"): (None, None)}
    found = low_rank_report.Found(
        ["svd", "mimic"],
        ["uniform", "spectrum"],
        ["0.6"],
        {case: low_rank_report.Figures(*values) for case, values in figures.items()},
    )
    lines = low_rank_report.table(found).splitlines()
    assert lines[2:6] == [
        "| svd | uniform | 5.0e+04 | 40.00 |",
        "| svd | spectrum | 30.00 | **11.00** |",
        "| mimic | uniform | **12.50** | 11.50 |",
        "| mimic | spectrum | – | – |",
    ]
    assert lines[-2:] == [
        "Dense: 10.00; after the same tuning: 9.00.",
        "Not lowest with mimic: keep 0.6, after (svd spectrum).",
    ]


@pytest.mark.slow
def test_a_small_study_runs_and_is_not_done_twice(tiny_shape: Path, tmp_path: Path) -> None:
    command = [
        warm_python.python(),
        "benchmarks/low_rank_dense.py",
        f"out={tmp_path}/study",
        f"model={tiny_shape}",
        "steps=8",
    ]
    command += [f"input={ROOT}/docs/*.md", "vocabulary=300", "length=32", "compile.target=eager"]
    first, second = (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=True) for _ in range(2)
    )
    assert [line.split(":")[0] for line in first.stdout.splitlines()] == ["prepare", "train"]
    assert second.stdout == ""
    told = (tmp_path / "study" / "logs" / "train.log").read_text()
    perplexity = float(re.findall(r"^Evaluation loss: \S+, Perplexity: (\S+)$", told, re.MULTILINE)[-1])
    assert 100 < perplexity < 400  # 300 tokens

    command = [warm_python.python(), "benchmarks/low_rank_seeds.py", f"dataset={tmp_path}/study/dataset", "length=32"]
    command += [f"model={tmp_path}/study/dense", "tokens=256", "batch=4", "tune=2", "keeps=0.5"]
    command += ["seeds=1,2", "variants=svd_llm,mimic_dense,mimic_frozen,svd_llm_singular"]
    seeds = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=True)
    dense, *variants = (line.split() for line in seeds.stdout.splitlines())
    assert float(dense[1]) == pytest.approx(perplexity, rel=1e-3)
    assert [line[2] for line in variants] == ["svd_llm", "mimic_dense", "mimic_frozen", "svd_llm_singular"]
    assert variants[0][-3:] == ["+0.000", "±", "0.000"]  # against itself
    assert variants[3][4] == variants[0][4]  # the same product of other factors

    command[1] = "benchmarks/low_rank_rates.py"
    command[6:] = [
        "tune=2",
        "keeps=0.5",
        f"out={tmp_path}/rates",
        "methods=svd_llm,mimic_dense,mimic_gradient",
        "tune_lrs=1e-9,3e-3",
    ]
    command += ["allocations=uniform", "processes=2", "seeds=1,2"]
    first, second = (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=True) for _ in range(2)
    )
    cases = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "rates").glob("*.json")}
    assert cases.keys() == {"dense"} | {
        f"{method}-uniform-0.5" for method in ("svd_llm", "mimic_dense", "mimic_gradient")
    }
    assert cases["mimic_gradient-uniform-0.5"]["before"] != cases["mimic_dense-uniform-0.5"]["before"]
    assert all(case["after"]["1e-9"] == pytest.approx([case["before"]] * 2, rel=1e-5) for case in cases.values())
    assert all(0 < max(case["after"]["3e-3"]) < case["before"] for case in cases.values())
    assert cases["svd_llm-uniform-0.5"]["before"] == pytest.approx(float(variants[0][4].strip(",")), abs=1e-3)
    assert "trained" in first.stdout
    assert "trained" not in second.stdout
    best = f"{sum(cases['mimic_dense-uniform-0.5']['after']['3e-3']) / 2:.2f}"
    assert re.search(rf"^\| mimic_dense \| uniform \| [^|]* \| \**{re.escape(best)}", second.stdout, re.MULTILINE)
    assert (tmp_path / "rates" / "low-rank.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("script", "given", "told"),
    [
        ("low_rank_dense", ["model=demo"], "Expected one of steps=N and minutes=M"),
        ("low_rank_dense", ["steps=many"], "steps=many minutes=: no number. Expected e.g. steps=400."),
        ("low_rank_dense", ["steps=3", "model"], "Setting model has no value. Expected model=VALUE."),
        ("low_rank_seeds", ["modle=x"], "Unknown setting 'modle'. Did you mean 'model'?"),
        ("low_rank_seeds", ["model=x"], "dataset is not given. Expected dataset=DIR"),
        ("low_rank_rates", ["dataset=x"], "model is not given. Expected model=DIR"),
        ("low_rank_rates", ["model=x", "dataset=y", "processes=two"], "processes=two: 'two' is no number."),
        ("low_rank_rates", ["model=x", "dataset=y", "methods=svdllm"], "Unknown method 'svdllm'. Did you mean"),
        ("compress_speed", ["rows"], "Setting rows has no value. Expected rows=VALUE."),
    ],
)
def test_a_mistake_in_a_benchmarks_settings_is_one_line(script: str, given: list[str], told: str) -> None:
    done = subprocess.run(
        [warm_python.python(), f"benchmarks/{script}.py", *given], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {told}")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_time_of_a_compression_is_told(tiny_shape: Path) -> None:
    settings = f"config_name={tiny_shape} rows=4 length=16 batch_size=2 dtype=float32 device=cpu allocation=spectrum"
    done = subprocess.run(
        [warm_python.python(), "benchmarks/compress_speed.py", *settings.split()],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert (told["tokens"], told["layers"]) == (64, 14)
    assert sum(told["seconds_by_layer"].values()) == pytest.approx(told["seconds"], abs=0.5)
