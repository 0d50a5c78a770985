"""IREE as compiler and runtime. What makes its runtime lies in iree_cpu_cases.py, and runs in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apps.training.step_plan import StepPlan
from compiled.build import build
from compiled.mlir.compilers import CompileError
from compiled.mlir.iree_cpu import IreeCompiler
from compiled.mlir.lowering import MlirOptions
from tests import warm_python
from tests.compiled.conftest import Compile

pytest.importorskip("iree.compiler", reason="needs the extra [mlir]")
pytest.importorskip("iree.runtime", reason="needs the extra [mlir]")
CASES = Path(__file__).with_name("iree_cpu_cases.py")


def case(name: str, *arguments: str, python: str = sys.executable) -> Any:
    """What a case returns; a failed assertion in it, a crash of it, and whatever it writes to stderr are failures."""
    done = subprocess.run([python, CASES, name, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["new_values", "lending", "outliving"])
def test_tensors_and_results(name: str) -> None:
    case(name)


def test_in_place_donation_is_wrong_and_would_be_noticed() -> None:
    # should IREE learn to read an argument before it writes it, parameters need no second copy
    assert case("donating") is False


def test_a_refused_module_is_one_line_of_reasons() -> None:
    with pytest.raises(CompileError, match=r"^[^\n]*custom op 'nonsense.op'[^\n]*$"):
        IreeCompiler().compile(b"func.func @f() { nonsense.op }")


STEPS = 20
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any], float]] = {
    "float32-stablehlo-tied-chunked": (
        ("compile.mlir.dialect=stablehlo", "compile.head_chunks=2", "run.recompute=block", "optimizer=sgdm"),
        {"tie_word_embeddings": True},
        1e-5,
    ),
    "bfloat16-parameters-articles": (("model.dtype=bfloat16", "model.article_attention=true"), {}, 5e-3),
    "bfloat16-autocast": (("model.compute_dtype=bfloat16",), {}, 5e-3),
    "float32-torch-lowrank": (("compile.mlir.dialect=torch",), {}, 1e-5),
    # sums in another order: an element at the edge of a level goes to the next one, 1/255 of the range away
    "float32-optical": (("optimizer=sgdm",), {}, 1e-4),
}
RULES: dict[str, tuple[dict[str, Any], ...]] = {
    "float32-torch-lowrank": ({"match": "*_proj", "use": "lowrank", "rank": 8},),
    "float32-optical": ({"match": "*_proj", "use": "optical"},),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_the_eager_twin(compile_step: Compile, tiny_config: Callable[..., Path], variant: str) -> None:
    pytest.importorskip("torch_mlir", reason="needs the extra [mlir]")
    settings, fields, tolerance = VARIANTS[variant]
    settings, rules = ("compile.target=mlir", *settings), RULES.get(variant, ())
    artifact = compile_step(*settings, rules=rules, **fields).artifact
    shape = ("training.batch_size=2", "model.max_seq_length=16", "compile.arch=cpu")
    config = f"checkpoint.config_name={tiny_config(**fields)}"
    shape = (*shape, f"backend.rules={json.dumps(rules)}")
    given = (str(artifact.path), str(STEPS), "command=run", config, *shape, *settings)
    found = case("steps", *given, python=warm_python.python())
    assert found["loss"] <= tolerance
    assert found["norm"] <= 10 * tolerance
    assert found["evaluation"] <= tolerance
    # Adam divides by the gradient's own size: where a gradient is all rounding, so is its update
    assert found["parameters"] <= 10 * tolerance


@pytest.mark.slow
def test_the_module_of_the_whole_step_equals_the_eager_twin(
    plan_of: Callable[..., StepPlan], tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("torch_mlir", reason="needs the extra [mlir]")
    settings, fields = ("compile.target=mlir", "compile.mlir.compiler=none"), {"num_hidden_layers": 1}
    plan = plan_of(*settings, **fields)
    artifact = tmp_path / "whole.substrate"
    mlir = MlirOptions(whole_step=True)
    artifact.write_bytes(build(plan.model, plan.spec, plan.optimizers, plan.precision, mlir=mlir))
    shape = ("training.batch_size=2", "model.max_seq_length=16", "compile.arch=cpu")
    config = f"checkpoint.config_name={tiny_config(**fields)}"
    given = (str(artifact), "3", "command=run", config, *shape, *settings)
    found = case("whole_step", *given, python=warm_python.python())
    assert found["loss"] <= 1e-5
    assert found["norm"] <= 1e-5
    assert found["parameters"] <= 1e-4
