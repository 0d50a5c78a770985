"""The compiled step against its eager twin: same model, same data, plain autograd and torch.optim.AdamW."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modelzoo
from apps.training.eager_program import EagerProgram
from backends.errors import UserError
from tests.compiled.conftest import Compile, Compiled

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2}


def twins(compiled: Compiled) -> tuple[Any, Any, Any, EagerProgram]:
    ours, theirs = compiled.model(), compiled.model()
    return (
        ours,
        compiled.program(ours),
        theirs,
        EagerProgram(theirs, precision=compiled.plan.precision, loss_terms=compiled.loss_terms),
    )


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative distance between two sets of tensors."""
    assert ours.keys() == theirs.keys()
    pairs = ((ours[name].detach().double(), theirs[name].detach().double()) for name in ours)
    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)


def assert_same_training(compiled: Compiled, steps: int, clip: float | None, microbatches: int) -> None:
    ours, program, theirs, twin = twins(compiled)
    tolerance = TOLERANCE[compiled.plan.precision.parameters]
    for step in range(1, steps + 1):
        batches = [compiled.batch(100 * step + index, 0.7, of=20) for index in range(microbatches)]
        hyper = compiled.hyperparameters(ours, step)
        result, expected = program.train_step(batches, hyper, clip), twin.train_step(batches, hyper, clip)
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
        assert (result.objective is None) == (expected.objective is None) == (not compiled.loss_terms)
        if result.objective is not None:
            assert result.objective.item() == pytest.approx(expected.objective.item(), rel=tolerance)
            assert result.objective.item() > result.loss.item()
        if clip is not None:
            assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=tolerance)
    weights = difference(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    # Adam divides by the gradient's own size: where a gradient is all rounding, so is its update
    assert weights <= 100 * tolerance


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_training_equals_the_eager_twin(tiny: Compiled, clip: float | None, microbatches: int) -> None:
    assert_same_training(tiny, steps=5, clip=clip, microbatches=microbatches)


@pytest.mark.parametrize("chunks", [1, 4])
def test_fifty_steps_in_float32_stay_within_1e_5(compile_step: Compile, chunks: int) -> None:
    compiled = compile_step("model.dtype=float32", f"compile.head_chunks={chunks}")
    assert_same_training(compiled, steps=50, clip=1.0, microbatches=1)


def test_fifty_steps_in_float64_stay_within_1e_10(tiny: Compiled) -> None:
    assert_same_training(tiny, steps=50, clip=None, microbatches=1)


def test_bfloat16_parameters_train_through_their_masters(compile_step: Compile) -> None:
    assert_same_training(compile_step("model.dtype=bfloat16"), steps=5, clip=1.0, microbatches=2)


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        (
            ("model.dtype=float64", "compile.head_chunks=4", "model.article_attention=true"),
            {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        ),
        (("model.dtype=float64", "compile.head_chunks=4", "run.recompute=block"), {}),
        (
            ("model.dtype=float64", "compile.head_chunks=4", "training.label_smoothing=0.3", "training.z_loss=1e-4"),
            {},
        ),
    ],
    ids=["tied-biased-articles", "chunked-and-recomputed", "smoothed-and-z-loss"],
)
def test_every_variant_of_the_step_equals_the_eager_twin(
    compile_step: Compile, settings: tuple[str, ...], fields: dict[str, Any]
) -> None:
    compiled = compile_step(*settings, **fields)
    assert_same_training(compiled, steps=3, clip=0.5, microbatches=2)
    assert_same_training(compiled, steps=3, clip=None, microbatches=1)


def test_gradients_equal_autograd_and_change_nothing(tiny: Compiled) -> None:
    ours, program, _, twin = twins(tiny)
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    batches = [tiny.batch(1, 0.5, of=30), tiny.batch(2, 0.9, of=30)]
    assert difference(program.gradients(batches), twin.gradients(batches)) <= 1e-12
    assert all(torch.equal(before[name], parameter) for name, parameter in ours.named_parameters())
    assert all(not tensor.any() for tensor in program.optimizer_state().values())


def test_a_batch_without_a_counted_token_contributes_exactly_nothing(tiny: Compiled) -> None:
    _, program, _, _ = twins(tiny)
    full, empty = tiny.batch(1, of=32), tiny.batch(2, counted=0.0, of=32)
    alone, together = program.gradients([full]), program.gradients([full, empty])
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    nothing = program.gradients([empty])
    assert all(not gradient.any() for gradient in nothing.values())


def test_evaluation_equals_the_twin_and_updates_nothing(tiny: Compiled) -> None:
    ours, program, _, twin = twins(tiny)
    before = [parameter.clone() for parameter in ours.parameters()]
    batch = tiny.batch(3, 0.6)
    assert program.evaluate(batch).item() == pytest.approx(twin.evaluate(batch).item(), rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


def test_runtime_settings_need_no_new_artifact(tiny: Compiled, compile_step: Compile) -> None:
    """Rate, clipping and accumulation are tensors or schedule: a fresh compile gives the same bits."""
    fresh = compile_step("model.dtype=float64", "optimizer.lr=0.7", "training.gradient_accumulation_steps=2", anew=True)
    weights = []
    for compiled in (tiny, fresh):
        model = compiled.model()
        program = compiled.program(model)
        for step in (1, 2):
            batches = [compiled.batch(step, of=64), compiled.batch(step + 9, of=64)]
            program.train_step(batches, compiled.hyperparameters(model, step, lr=0.7), 0.1)
        weights.append([parameter.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_optimizer_state_goes_out_and_in(tiny: Compiled) -> None:
    first_model, second_model = tiny.model(), tiny.model()
    first, second = tiny.program(first_model), tiny.program(second_model)
    first.train_step([tiny.batch(1)], tiny.hyperparameters(first_model, 1), None)
    second_model.load_state_dict(first_model.state_dict())
    second.load_optimizer_state({name: tensor.clone() for name, tensor in first.optimizer_state().items()})
    for program, model in ((first, first_model), (second, second_model)):
        program.train_step([tiny.batch(2)], tiny.hyperparameters(model, 2), None)
    pairs = zip(first_model.parameters(), second_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight\.exp_avg .* got nothing"):
        second.load_optimizer_state({})


def test_a_wrong_dtype_is_refused_before_any_machine_code_runs(tiny: Compiled) -> None:
    program = tiny.program(tiny.model())
    batch = tiny.batch(1)
    batch["grad_scale"] = batch["grad_scale"].float()
    with pytest.raises(UserError, match=r"'head_train' expects grad_scale as float64\[32\].*got float32"):
        program.train_step([batch], tiny.hyperparameters(program.model, 1), None)


def test_a_model_with_other_parameters_is_refused(tiny: Compiled, tiny_config: Callable[..., Path]) -> None:
    deeper = modelzoo.build_model(modelzoo.load_config(config_name=tiny_config(num_hidden_layers=3)), dtype="float64")
    with pytest.raises(UserError, match=r"unknown to it: \['model\.layers\.2"):
        tiny.program(deeper)
