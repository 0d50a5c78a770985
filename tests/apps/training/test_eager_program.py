"""The eager twin against a training loop written out by hand on plain transformers."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from apps.training.config_schema import OptimizerConfig
from apps.training.eager_program import EagerProgram
from apps.training.hyperparameters import hyperparameter_table
from apps.training.optimizers.adamw import AdamW
from apps.training.parameter_groups import parameter_groups
from backends.errors import UserError
from backends.precision import PrecisionPolicy, resolve

CONFIG = AdamW.Config(lr=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.99)


def tiny_llama(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype)


def random_microbatches(count: int, dtype: torch.dtype, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 31, (count, 2, 7), generator=generator)
    mask = torch.rand(count, 2, 7, generator=generator) < 0.8
    scale = mask.to(dtype) / mask.sum()
    labels = torch.where(mask, torch.randint(0, 31, (count, 2, 7), generator=generator), 0)
    return [{"input_ids": i, "labels": t, "grad_scale": g} for i, t, g in zip(ids, labels, scale, strict=True)]


def program_of(model: LlamaForCausalLM, precision: PrecisionPolicy) -> EagerProgram:
    return EagerProgram(model, precision=precision)


def table(
    model: LlamaForCausalLM, step: int, dtype: torch.dtype = torch.float64, config: AdamW.Config = CONFIG
) -> Tensor:
    groups = parameter_groups(OptimizerConfig(settings=config), model)
    names = [name for name, _ in model.named_parameters()]
    return hyperparameter_table(names, groups, step=step, rate=lambda peak: peak / step, dtype=dtype)


def by_hand(model: LlamaForCausalLM, steps: list[list[dict[str, Tensor]]], max_grad_norm: float | None) -> list[float]:
    """Mean cross-entropy of the counted positions of all microbatches at once, clipped, torch's AdamW."""
    bare = [p for n, p in model.named_parameters() if "norm" in n or n.endswith("bias")]
    decayed = [p for p in model.parameters() if not any(p is q for q in bare)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": CONFIG.weight_decay}, {"params": bare, "weight_decay": 0.0}],
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.eps,
    )
    losses = []
    for step, parts in enumerate(steps, start=1):
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        log_p = model(input_ids=whole["input_ids"]).logits.log_softmax(-1)
        counted = whole["grad_scale"] > 0
        loss = -log_p.gather(-1, whole["labels"][..., None]).squeeze(-1)[counted].mean()
        optimizer.zero_grad()
        loss.backward()
        if max_grad_norm is not None:
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            for p in model.parameters():
                p.grad *= min(1.0, max_grad_norm / (norm.item() + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.lr / step
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_ten_steps_equal_a_loop_by_hand_in_fp64(accumulation: int, max_grad_norm: float | None) -> None:
    dtype = torch.float64
    mine, theirs = tiny_llama(dtype), tiny_llama(dtype)
    steps = [random_microbatches(accumulation, dtype, seed) for seed in range(10)]
    program = program_of(mine, resolve("float64"))
    losses = [
        program.train_step(parts, table(mine, i), max_grad_norm).loss.item() for i, parts in enumerate(steps, start=1)
    ]
    assert losses == pytest.approx(by_hand(theirs, steps, max_grad_norm), rel=1e-10)
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-10, name


def test_the_gradient_norm_is_the_unclipped_one_and_absent_without_clipping() -> None:
    model = tiny_llama(torch.float64)
    program = program_of(model, resolve("float64"))
    parts = random_microbatches(2, torch.float64)
    expected = torch.cat([g.flatten() for g in program.gradients(parts).values()]).norm()
    assert program.train_step(parts, table(model, 1), 1e-3).grad_norm.item() == pytest.approx(
        expected.item(), rel=1e-12
    )
    assert program.train_step(parts, table(model, 2), None).grad_norm is None


def test_the_plugins_arithmetic_and_torchs_give_the_same_weights() -> None:
    model = tiny_llama(torch.float64)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    program = program_of(model, resolve("float64"))
    parts = random_microbatches(1, torch.float64)
    gradients, rows = program.gradients(parts), table(model, 1)
    program.train_step(parts, rows, None)
    for row, (name, parameter) in zip(rows, model.named_parameters(), strict=True):
        zeros = {key: torch.zeros_like(parameter) for key in AdamW.state_names}
        hyper = dict(zip(AdamW.hyperparameter_names, row, strict=True))
        expected, _ = AdamW().update(start[name], gradients[name], zeros, hyper)
        assert (parameter - expected).abs().max() <= 1e-12, name


def test_a_batch_without_a_counted_position_gives_exactly_zero_and_moves_nothing_but_by_decay() -> None:
    model = tiny_llama(torch.float32)
    program = program_of(model, resolve("float32"))
    (part,) = random_microbatches(1, torch.float32)
    part["grad_scale"] = torch.zeros_like(part["grad_scale"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = program.train_step([part], table(model, 1, torch.float32), 1.0)
    assert result.loss.item() == 0.0
    assert result.grad_norm.item() == 0.0
    for name, parameter in model.named_parameters():
        factor = 1 - CONFIG.lr * CONFIG.weight_decay if parameter.ndim >= 2 else 1.0
        assert torch.allclose(parameter, before[name] * factor, rtol=1e-6, atol=0), name


def test_evaluation_gives_the_steps_loss_and_changes_nothing() -> None:
    model = tiny_llama(torch.float64).train()
    program = program_of(model, resolve("float64"))
    (part,) = random_microbatches(1, torch.float64)
    before = copy.deepcopy(model.state_dict())
    loss = program.evaluate(part)
    assert model.training
    assert not loss.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert loss.item() == pytest.approx(program.train_step([part], table(model, 1), None).loss.item(), rel=1e-12)


def test_float32_masters_keep_what_bfloat16_weights_would_lose() -> None:
    small = AdamW.Config(lr=1e-6, weight_decay=0.0)
    moved = {}
    for masters in ("float32", "none"):
        model = tiny_llama(torch.bfloat16)
        program = program_of(model, resolve("bfloat16", master=masters))
        start = {name: w.clone() for name, w in program.weights.items()}
        for step in range(1, 4):
            program.train_step(random_microbatches(1, torch.float32), table(model, step, torch.float32, small), None)
        moved[masters] = sum((w != start[name]).sum().item() for name, w in program.weights.items())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, program.weights[name].bfloat16()), name
    total = sum(p.numel() for p in model.parameters())
    assert moved["float32"] > 0.9 * total
    assert moved["none"] < 0.3 * total


def test_bfloat16_moments_hold_bfloat16_numbers() -> None:
    model = tiny_llama(torch.bfloat16)
    program = program_of(model, resolve("bfloat16", moments="bfloat16"))
    program.train_step(random_microbatches(1, torch.float32), table(model, 1, torch.float32), 1.0)
    moments = [value for name, value in program.optimizer_state().items() if name.endswith(".exp_avg")]
    assert len(moments) == len(program.parameters)
    for moment in moments:
        assert torch.equal(moment, moment.bfloat16().float())


@pytest.mark.parametrize("precision", [resolve("float32"), resolve("bfloat16"), resolve("bfloat16", master="none")])
def test_training_continues_exactly_from_a_stored_optimizer_state(precision: PrecisionPolicy) -> None:
    dtype = getattr(torch, precision.parameters)
    whole = tiny_llama(dtype)
    program = program_of(whole, precision)
    parts = [random_microbatches(1, torch.float32, seed) for seed in range(4)]
    for step in (1, 2):
        program.train_step(parts[step - 1], table(whole, step, torch.float32), 1.0)
    resumed = tiny_llama(dtype)  # other weights, which the program sees first
    second = program_of(resumed, precision)
    resumed.load_state_dict(whole.state_dict())
    second.load_optimizer_state(copy.deepcopy(program.optimizer_state()))
    for step in (3, 4):
        program.train_step(parts[step - 1], table(whole, step, torch.float32), 1.0)
        second.train_step(parts[step - 1], table(resumed, step, torch.float32), 1.0)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_compiled_steps_optimizer_state_is_refused_in_one_line() -> None:
    """It has moments of every parameter, and no count of steps."""
    program = EagerProgram(tiny_llama(torch.float32), precision=resolve("float32"))
    state = {
        f"{name}.{key}": torch.zeros_like(each)
        for name, each in program.parameters.items()
        for key in AdamW.state_names
    }
    with pytest.raises(
        UserError, match=r"has no model\.embed_tokens\.weight\.step, .* Load it with the compile\.target"
    ):
        program.load_optimizer_state(state)
