"""The whole step as one function: the numbers of the eager twin, and a module that names what goes in and comes out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.training.eager_program import EagerProgram
from apps.training.step_plan import StepPlan
from backends.articles import article_spans
from backends.errors import UserError
from compiled.build import build
from compiled.mlir.isolation import Limits
from compiled.mlir.lowering import MlirOptions, lower_whole
from compiled.mlir.whole_step import WholeStep
from compiled.mlir.whole_step_arguments import StepArguments
from tests.compiled.conftest import Compiled
from tests.compiled.mlir.conftest import OPTICAL, Capture, CapturedStep

pytest.importorskip("torch_mlir", reason="the extra [mlir] is not installed")

OPTICAL_RULES = [{"match": "*.self_attn", "use": "optical"}, {"match": "*.down_proj", "use": "optical"}]


def whole(step: CapturedStep) -> WholeStep:
    names = [name for name, _ in step.plan.model.named_parameters()]
    arguments = StepArguments(step.regions, step.schedule, names, step.plan.precision)
    return WholeStep(step.regions, step.schedule, arguments, skips=step.plan.spec.skips_nonfinite)


def given(step: WholeStep, compiled: Compiled, model: Any, number: int, state: dict[str, Tensor]) -> list[Tensor]:
    """The arguments of one step, in order, from the model, its optimizer's `state` and a batch."""
    batch = compiled.batch(number)
    cos, sin = model.rotary_tables(compiled.plan.spec.max_seq_length, torch.device("cpu"))
    named = dict(model.named_parameters()) | dict(model.named_buffers()) | batch | state
    named |= {"cos": cos, "sin": sin, "first_row": torch.zeros((), dtype=torch.int64)}
    named |= {"hyperparameters": compiled.hyperparameters(model, number), "max_grad_norm": torch.tensor(0.5)}
    if compiled.plan.spec.article_attention:
        named["articles"] = article_spans(batch["article_ids"])
    values = []
    for name, value in step.arguments.values.items():
        dtype = getattr(torch, value.dtype)
        values.append(named[name].detach().to(dtype) if name in named else torch.zeros(value.shape, dtype=dtype))
    return values


CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], list[dict[str, Any]]]] = {
    "adamw, tied, chunks": (("compile.head_chunks=2",), {"tie_word_embeddings": True}, []),
    "sgdm, articles": (("optimizer=sgdm", "model.article_attention=true"), {}, []),
    "optical": ((OPTICAL, "training.max_nonfinite_steps=2"), {"num_hidden_layers": 1}, OPTICAL_RULES),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_eager_twin_in_one_function(capture: Capture, case: str) -> None:
    """Two steps: loss, norm, parameters and backends' state; moments and masters go on from the first to the second."""
    settings, fields, rules = CASES[case]
    captured = capture(*settings, **fields)
    compiled = Compiled(captured.plan, None, rules)  # type: ignore[arg-type]
    step = whole(captured)
    mine, twin = compiled.model(), compiled.model()
    eager = EagerProgram(
        twin,
        precision=captured.plan.precision,
        groups=captured.plan.groups,
        skips_nonfinite=captured.plan.spec.skips_nonfinite,
    )
    state: dict[str, Tensor] = {}
    for number in (1, 2):
        expected = eager.train_step([compiled.batch(number)], compiled.hyperparameters(twin, number), 0.5)
        with torch.no_grad():
            values = step(*given(step, compiled, mine, number, state))
            results = dict(zip(step.arguments.results, values, strict=True))
            held = dict(mine.named_parameters()) | dict(mine.named_buffers())
            for name in step.arguments.new:
                if name in held:
                    held[name].copy_(results[f"new_{name}"])
                else:
                    state[name] = results[f"new_{name}"]
        torch.testing.assert_close(results["loss"], expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(results["grad_norm"], expected.grad_norm, rtol=1e-5, atol=1e-6)
        theirs = dict(twin.named_parameters()) | dict(twin.named_buffers())
        for name, tensor in held.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_module_names_every_argument_and_result(capture: Capture) -> None:
    captured = capture("compile.head_chunks=2", tie_word_embeddings=True)
    step = whole(captured)
    module = step.arguments.module()
    outcome = lower_whole(step, "linalg", Limits(120, 8))
    text = outcome.value.decode()
    signature = text[text.index("func.func @step(") :].split("{", 1)[0]
    types = {"float32": "f32", "int64": "i64"}
    shown = [
        f"%arg{index}: tensor<{'x'.join([*map(str, value.shape), types[value.dtype]])}>"
        for index, value in enumerate(module.arguments)
    ]
    assert ", ".join(shown) in signature
    back = [f"tensor<{'x'.join([*map(str, value.shape), types[value.dtype]])}>" for value in module.results]
    assert ", ".join(back) in signature.split("->")[1]
    parameters = {name: tuple(each.shape) for name, each in captured.plan.model.named_parameters()}
    assert {each.name: each.shape for each in module.arguments if each.role == "parameter"} == parameters
    moments = {each.name for each in module.arguments if each.role == "moment"}
    assert moments == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in parameters}
    assert len(module.donations) == 3 * len(parameters)
    for argument, result in module.donations:
        before, after = module.arguments[argument], module.results[result]
        assert (after.name, after.role, after.dtype, after.shape) == (
            f"new_{before.name}",
            before.role,
            before.dtype,
            before.shape,
        )


def test_it_grows_with_the_depth_and_holds_no_weights(capture: Capture) -> None:
    sizes = {}
    for layers in (1, 2):
        step = whole(capture("optimizer=sgdm", num_hidden_layers=layers))
        sizes[layers] = len(lower_whole(step, "stablehlo", Limits(120, 8)).value)
    assert 1.4 < sizes[2] / sizes[1] < 2.2
    assert sizes[1] < 100_000


def test_a_step_that_is_not_finite_changes_nothing(capture: Capture) -> None:
    settings, fields, rules = CASES["optical"]
    captured = capture(*settings, **fields)
    compiled = Compiled(captured.plan, None, rules)  # type: ignore[arg-type]
    step, model = whole(captured), compiled.model()
    values = given(step, compiled, model, 1, {})
    scale = step.arguments.names.index("grad_scale")
    values[scale] = torch.full_like(values[scale], torch.nan)
    with torch.no_grad():
        results = dict(zip(step.arguments.results, step(*values), strict=True))
    assert results["loss"].isnan()
    before = dict(zip(step.arguments.names, values, strict=True))
    for name in step.arguments.new:
        torch.testing.assert_close(results[f"new_{name}"], before[name], rtol=0, atol=0)


def test_a_teacher_is_refused_before_anything_is_traced(plan_of: Callable[..., StepPlan]) -> None:
    plan = plan_of("compile.target=mlir", "compile.mlir.compiler=none")
    mlir = MlirOptions(whole_step=True)
    with pytest.raises(UserError, match=r"^compile\.mlir\.whole_step=true .* Drop one of them"):
        build(plan.model, plan.spec, plan.optimizers, plan.precision, teacher=plan.model, mlir=mlir)
