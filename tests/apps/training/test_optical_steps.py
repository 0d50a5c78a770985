"""Optical training steps do not depend on how their rows are dealt out."""

import pytest
import torch
from transformers import LlamaConfig

import modelzoo
from apps.training.config_schema import OptimizerConfig
from apps.training.eager_program import EagerProgram
from apps.training.hyperparameters import hyperparameter_table
from apps.training.parameter_groups import parameter_groups
from backends.precision import PrecisionPolicy
from backends.routing import route
from modelzoo.configuration_transformer import ConfigurationTransformer

ROWS, TOKENS, VOCABULARY = 8, 12, 64
DOUBLE = PrecisionPolicy(
    **dict.fromkeys(("parameters", "compute", "norms", "residual", "logits", "moments"), "float64")
)


def build() -> tuple[torch.nn.Module, EagerProgram]:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
    )
    model = modelzoo.build_model(ConfigurationTransformer().transform(config), dtype="float64", seed=3)
    route(model, [{"match": "*lm_head", "use": "optical", "q_levels": 64}], "optical")
    return model, EagerProgram(model, precision=DOUBLE)


def rows_of_step(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS + 1), generator=generator)
    scale = torch.full((ROWS, TOKENS), 1 / (ROWS * TOKENS), dtype=torch.float64)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "grad_scale": scale}


def dealt(batch: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    return [
        {name: tensor[first : first + rows] for name, tensor in batch.items()} | {"first_row": torch.tensor(first)}
        for first in range(0, ROWS, rows)
    ]


def train(rows: int, order: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of four steps in microbatches of `rows` rows, in this or the other order; and all tensors at the end."""
    model, program = build()
    program.calibrate(dealt(rows_of_step(0), rows)[::order])
    groups, names = parameter_groups(OptimizerConfig(), model), [name for name, _ in model.named_parameters()]
    losses = []
    for step in range(1, 5):
        table = hyperparameter_table(names, groups, step=step, rate=lambda peak: 1e-2, dtype=torch.float64)
        losses.append(program.train_step(dealt(rows_of_step(step), rows)[::order], table, 1.0).loss.item())
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return losses, {name: tensor for name, tensor in tensors.items() if not name.endswith("first_row")}


@pytest.mark.parametrize(("rows", "order"), [(1, 1), (2, -1), (4, 1)])
def test_microbatches_in_any_order_give_the_losses_weights_and_ranges_of_the_whole_batch(rows: int, order: int) -> None:
    losses, tensors = train(rows, order)
    expected_losses, expected = train(ROWS)
    assert losses == pytest.approx(expected_losses, rel=1e-10)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            tensors[name], tensor, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_numbers_of_a_run_are_its_own_again() -> None:
    assert train(2)[0] == train(2)[0]
