"""The head with its loss and the optimizer's update, as captured, against cross entropy, autograd and AdamW itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apps.training.hyperparameters import hyperparameter_table
from apps.training.optimizers.adamw import AdamW
from apps.training.step_plan import StepPlan
from backends.precision import PrecisionPolicy, resolve
from compiled import lowering
from compiled.capture import Captured, Sources
from compiled.capture_parts import accumulation_dtype, capture_head, capture_update, head_stage, loss_sum
from tests.compiled.interpreted import assert_close, random_inputs, run

PlanOf = Callable[..., StepPlan]
TOKENS = 32


def sources() -> Sources:
    return Sources(lowering.fake_mode(), torch.device("cpu"))


def reference_loss(logits: Tensor, labels: Tensor, grad_scale: Tensor) -> Tensor:
    return (F.cross_entropy(logits.to(grad_scale.dtype), labels, reduction="none") * grad_scale).sum()


@given(st.integers(1, 20), st.integers(2, 40), st.integers(0, 10**6), st.sampled_from([1.0, 30.0, 300.0]))
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(rows: int, vocab: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    scale = torch.rand(rows, generator=generator, dtype=torch.float64) * (torch.rand(rows, generator=generator) < 0.7)
    ours, theirs = loss_sum(logits, labels, scale), reference_loss(logits, labels, scale)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12, abs=1e-12)
    (mine,), (other,) = torch.autograd.grad(ours, [logits]), torch.autograd.grad(theirs, [logits])
    assert (mine - other).abs().max() <= 1e-12


def test_a_token_with_weight_zero_adds_exactly_nothing() -> None:
    logits, labels = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64)
    assert loss_sum(logits * 1e4, labels, torch.zeros(4)).item() == 0.0
    one = torch.tensor([0.0, 1.0, 0.0, 0.0])
    expected = F.cross_entropy(logits[1:2], labels[1:2]).item()
    assert loss_sum(logits, labels, one).item() == pytest.approx(expected, rel=1e-6)
    assert loss_sum(logits.bfloat16(), labels, one).dtype == torch.float32


@pytest.mark.parametrize(("logits_dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 3e-2)])
def test_logits_are_cast_to_their_dtype_before_the_loss(plan_of: PlanOf, logits_dtype: str, tolerance: float) -> None:
    """In bfloat16 the product itself is rounded; the loss of those logits is exact only where they are cast first."""
    train, evaluate = head_of(plan_of("model.dtype=bfloat16", f"model.logits_dtype={logits_dtype}"), chunks=1)
    tensors = random_inputs(train) | {"labels": torch.arange(TOKENS), "grad_scale": torch.full((TOKENS,), 1 / TOKENS)}
    normed = F.rms_norm(tensors["hidden_states"].float(), (32,), eps=1e-6).bfloat16() * tensors["norm.weight"]
    expected = reference_loss(normed @ tensors["head.weight"].t(), tensors["labels"], tensors["grad_scale"]).item()
    for captured in (train, evaluate):
        assert run(captured, tensors)["loss"].item() == pytest.approx(expected, rel=tolerance)


def head_of(plan: StepPlan, chunks: int) -> tuple[Captured, Captured]:
    stage = head_stage(plan.model)
    with lowering.quiet_torch():
        train, evaluate = capture_head(stage, sources(), plan.precision, TOKENS, plan.model_config.hidden_size, chunks)
    return train, evaluate


def head_tensors(train: Captured) -> dict[str, Tensor]:
    """Inputs for all tokens; `sum_` buffers start at zero."""
    tensors = random_inputs(train)
    generator = torch.Generator().manual_seed(5)
    tensors["hidden_states"] = torch.randn(TOKENS, 32, generator=generator, dtype=torch.float64)
    tensors["labels"] = torch.randint(0, 96, (TOKENS,), generator=generator)
    tensors["grad_scale"] = (torch.arange(TOKENS) % 3 > 0).double() / 21
    return {name: torch.zeros_like(value) if name.startswith("sum_") else value for name, value in tensors.items()}


def reference_head(tensors: dict[str, Tensor], trained: list[str]) -> tuple[float, dict[str, Tensor]]:
    """RMS norm, projection and cross entropy written out, and autograd through them."""
    leaves = {name: tensors[name].clone().requires_grad_() for name in ("hidden_states", *trained)}
    named = tensors | leaves
    hidden = named["hidden_states"]
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6) * named["norm.weight"]
    loss = reference_loss(normed @ named["head.weight"].t(), tensors["labels"], tensors["grad_scale"])
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def test_the_head_in_one_piece_equals_autograd(plan_of: PlanOf) -> None:
    train, evaluate = head_of(plan_of("model.dtype=float64"), chunks=1)
    tensors = head_tensors(train)
    loss, gradients = reference_head(tensors, ["norm.weight", "head.weight"])
    outputs = run(train, tensors)
    assert outputs.pop("loss").item() == pytest.approx(loss, rel=1e-12)
    assert_close(outputs, gradients)
    assert run(evaluate, tensors)["loss"].item() == pytest.approx(loss, rel=1e-12)
    assert train.spec.mutated == []


@pytest.mark.parametrize("chunks", [2, 8])
def test_the_head_in_chunks_sums_to_the_whole(plan_of: PlanOf, chunks: int) -> None:
    train, evaluate = head_of(plan_of("model.dtype=float64"), chunks)
    tensors = head_tensors(train)
    loss, gradients = reference_head(tensors, ["norm.weight", "head.weight"])
    per_token = ("hidden_states", "labels", "grad_scale")
    losses, evaluated, hidden = [], [], []
    for piece in range(chunks):
        rows = slice(piece * TOKENS // chunks, (piece + 1) * TOKENS // chunks)
        chunk = tensors | {name: tensors[name][rows] for name in per_token}
        outputs = run(train, chunk)
        losses.append(outputs["loss"].item())
        hidden.append(outputs["grad_hidden_states"])
        evaluated.append(run(evaluate, chunk)["loss"].item())
    assert sum(losses) == pytest.approx(loss, rel=1e-12)
    assert sum(evaluated) == pytest.approx(loss, rel=1e-12)
    sums = {f"grad_{name}": tensors[f"sum_{name}"] for name in ("norm.weight", "head.weight")}
    assert_close(sums | {"grad_hidden_states": torch.cat(hidden)}, gradients)
    assert train.spec.mutated == ["sum_norm.weight", "sum_head.weight"]


def test_full_logits_never_exist(plan_of: PlanOf) -> None:
    train, _ = head_of(plan_of("model.dtype=float64", vocab_size=500), chunks=8)
    largest = max(
        node.meta["val"].numel() for node in train.graph.graph.nodes if hasattr(node.meta.get("val"), "numel")
    )
    assert largest == 500 * 32  # the weight and its gradient
    logits = [node.meta["val"].shape for node in train.graph.graph.nodes if node.target == torch.ops.aten.mm.default]
    assert (TOKENS // 8, 500) in {tuple(shape) for shape in logits}


def test_a_frozen_projection_gets_no_gradient(plan_of: PlanOf) -> None:
    plan = plan_of("model.dtype=float64")
    plan.model.lm_head.weight.requires_grad_(False)
    train, _ = head_of(plan, chunks=1)
    outputs = run(train, tensors := head_tensors(train))
    _, gradients = reference_head(tensors, ["norm.weight"])
    outputs.pop("loss")
    assert_close(outputs, gradients)


def test_bfloat16_gradients_of_chunks_are_summed_in_float32(plan_of: PlanOf) -> None:
    train, _ = head_of(plan_of("model.dtype=bfloat16"), chunks=4)
    dtypes = {spec.name: spec.dtype for spec in train.spec.inputs}
    assert dtypes["head.weight"] == "bfloat16"
    assert dtypes["sum_head.weight"] == dtypes["grad_scale"] == "float32"
    assert [accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)] == [torch.float32, torch.float64]


SHAPES = {"weight": (3, 4), "bias": (4,)}


def captured_update(policy: PrecisionPolicy, gradient: torch.dtype) -> Captured:
    made = sources()
    parameters = {name: made.empty(shape, getattr(torch, policy.parameters)) for name, shape in SHAPES.items()}
    return capture_update("update", AdamW(), parameters, dict.fromkeys(SHAPES, gradient), policy, made)


def take_steps(captured: Captured, start: dict[str, Tensor], steps: int, coefficient: float) -> dict[str, Tensor]:
    """The region over several steps with gradients from a generator; returns the live tensors."""
    specs = {spec.name: spec for spec in captured.spec.inputs}
    state = {
        name: torch.zeros(specs[name].shape, dtype=getattr(torch, specs[name].dtype)) for name in captured.spec.mutated
    }
    live: dict[str, Any] = state | start
    work = getattr(torch, specs["grad_coef"].dtype)
    live["grad_coef"] = torch.tensor(coefficient, dtype=work)
    for step in range(1, steps + 1):
        live["hyperparameters"] = hyperparameter_table(
            [start[name] for name in SHAPES],
            AdamW,
            AdamW.Config(weight_decay=0.3),
            step=step,
            lr=0.01 / step,
            dtype=work,
        )
        for name, gradient in gradients_of(step).items():
            live[f"grad_{name}"] = gradient.to(getattr(torch, specs[f"grad_{name}"].dtype))
        run(captured, live)
    return live


def gradients_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def adamw(start: dict[str, Tensor], steps: int, coefficient: float) -> dict[str, Tensor]:
    """Loshchilov & Hutter (2019), algorithm 2, in numbers of Python and float64 tensors; matrices alone decay."""
    values = {name: value.double() for name, value in start.items()}
    mean = {name: torch.zeros_like(value) for name, value in values.items()}
    square = {name: torch.zeros_like(value) for name, value in values.items()}
    for step in range(1, steps + 1):
        lr = 0.01 / step
        for name, gradient in gradients_of(step).items():
            gradient = gradient * coefficient
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.95 * square[name] + 0.05 * gradient**2
            direction = (mean[name] / (1 - 0.9**step)) / ((square[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            decay = 0.3 if values[name].ndim > 1 else 0.0
            values[name] = values[name] * (1 - lr * decay) - lr * direction
    return values


def starting_point(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(77)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("coefficient", [1.0, 0.25])
def test_the_update_is_adamw_in_place(coefficient: float) -> None:
    captured = captured_update(resolve("float64"), torch.float64)
    start = starting_point(torch.float64)
    expected = adamw(start, 5, coefficient)
    live = take_steps(captured, start, 5, coefficient)
    assert_close({name: live[name] for name in SHAPES}, expected)
    assert live["weight"] is start["weight"]
    assert set(captured.spec.mutated) == {
        f"{part}{name}" for name in SHAPES for part in ("", "exp_avg_", "exp_avg_sq_")
    }


def test_bfloat16_parameters_are_copies_of_masters_that_are_updated() -> None:
    """Steps far below bfloat16's spacing still add up."""
    captured = captured_update(resolve("bfloat16"), torch.bfloat16)
    start = starting_point(torch.bfloat16)
    masters = {f"master_{name}": value.float() for name, value in start.items()}
    expected = adamw(start, 5, 1.0)
    live = take_steps(captured, start | masters, 5, 1.0)
    assert_close({name: live[f"master_{name}"] for name in SHAPES}, expected, tolerance=2e-3)  # bfloat16 gradients
    assert all(torch.equal(live[name], live[f"master_{name}"].bfloat16()) for name in SHAPES)


def test_every_number_of_the_optimizer_is_an_input() -> None:
    """No rate or decay is written in the graph, so that one artifact serves them all."""
    captured = captured_update(resolve("float64"), torch.float64)
    numbers = {
        argument
        for node in captured.graph.graph.nodes
        for argument in node.args
        if isinstance(argument, float) and argument not in (0.0, 1.0)
    }
    assert not numbers
