"""The head with its loss as captured, against cross entropy and autograd. The update has a file of its own."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.training.step_plan import StepPlan
from compiled import lowering
from compiled.accumulation import accumulation_dtype
from compiled.capture import Captured, Sources
from compiled.capture_parts import capture_head, head_stage
from tests.compiled.interpreted import assert_close, random_inputs, run

PlanOf = Callable[..., StepPlan]
TOKENS = 32


def sources() -> Sources:
    return Sources(lowering.fake_mode(), torch.device("cpu"))


def reference_loss(logits: Tensor, labels: Tensor, grad_scale: Tensor) -> Tensor:
    return (F.cross_entropy(logits.to(grad_scale.dtype), labels, reduction="none") * grad_scale).sum()


@pytest.mark.parametrize(("logits_dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 3e-2)])
def test_logits_are_cast_to_their_dtype_before_the_loss(plan_of: PlanOf, logits_dtype: str, tolerance: float) -> None:
    """In bfloat16 the product itself is rounded; the loss of those logits is exact only where they are cast first."""
    train, evaluate = head_of(plan_of("model.dtype=bfloat16", f"model.logits_dtype={logits_dtype}"), chunks=1)
    tensors = random_inputs(train) | {"labels": torch.arange(TOKENS), "grad_scale": torch.full((TOKENS,), 1 / TOKENS)}
    normed = F.rms_norm(tensors["hidden_states"].float(), (32,), eps=1e-6).bfloat16() * tensors["norm.weight"]
    expected = reference_loss(normed @ tensors["head.weight"].t(), tensors["labels"], tensors["grad_scale"]).item()
    for captured in (train, evaluate):
        assert run(captured, tensors)["loss"].item() == pytest.approx(expected, rel=tolerance)


def head_of(plan: StepPlan, chunks: int, terms: Sequence[str] = ()) -> tuple[Captured, Captured]:
    stage, width = head_stage(plan.model), plan.model_config.hidden_size
    with lowering.quiet_torch():
        train, evaluate = capture_head(stage, sources(), plan.precision, TOKENS, width, chunks, terms)
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


@pytest.mark.parametrize("chunks", [1, 4])
def test_further_terms_change_the_gradients_and_not_the_loss(plan_of: PlanOf, chunks: int) -> None:
    """Against torch's label smoothing and a written-out z-loss, through autograd."""
    plan = plan_of("model.dtype=float64")
    train, evaluate = head_of(plan, chunks, ["label_smoothing", "z_loss"])
    tensors = head_tensors(train) | {
        "label_smoothing": torch.tensor(0.1, dtype=torch.float64),
        "z_loss": torch.tensor(0.02, dtype=torch.float64),
    }
    plain, _ = reference_head(tensors, [])

    leaves = {name: tensors[name].clone().requires_grad_() for name in ("hidden_states", "norm.weight", "head.weight")}
    normed = F.rms_norm(leaves["hidden_states"], (32,), leaves["norm.weight"], eps=1e-6)
    logits = normed @ leaves["head.weight"].t()
    smoothed = F.cross_entropy(
        logits, tensors["labels"], reduction="none", label_smoothing=float(tensors["label_smoothing"])
    )
    objective = ((smoothed + tensors["z_loss"] * logits.exp().sum(-1).log() ** 2) * tensors["grad_scale"]).sum()
    expected = dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))

    losses, hidden, outputs = [], [], {}
    for piece in range(chunks):
        rows = slice(piece * TOKENS // chunks, (piece + 1) * TOKENS // chunks)
        chunk = tensors | {name: tensors[name][rows] for name in ("hidden_states", "labels", "grad_scale")}
        outputs = run(train, chunk)
        losses.append(outputs["loss"])
        hidden.append(outputs["grad_hidden_states"])
    assert torch.stack(losses).sum(0).tolist() == pytest.approx([plain, objective.item()], rel=1e-12)
    found = {name: (outputs[f"grad_{name}"] if chunks == 1 else tensors[f"sum_{name}"]) for name in list(leaves)[1:]}
    assert_close(found | {"hidden_states": torch.cat(hidden)}, expected)
    # an evaluation knows none of it
    assert [spec.name for spec in evaluate.spec.inputs] == [spec.name for spec in head_of(plan, chunks)[1].spec.inputs]
    assert evaluate.identity == head_of(plan, chunks)[1].identity
