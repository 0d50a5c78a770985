"""What blocks keep between forward and backward, where the memory of the GPU that a step is compiled for decides it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apps.training.config_schema import TrainConfig
from apps.training.memory import estimate
from apps.training.parameter_groups import ParameterGroup, state_elements
from backends.precision import BITS, PrecisionPolicy

FILLED = 0.95  # of a device's memory, before activations are given up: allocators leave gaps, libraries want workspaces
# A block whose results are computed again costs a third of its time; one that keeps dear ones only, a hundredth. So the
# latter is the faster from where one in this many blocks would have to be computed again.
ONE_IN = 20


def planned_activations(
    config: TrainConfig, kind: str, model_config: Any, model: Any, groups: Sequence[ParameterGroup]
) -> str:
    """What `compile.activations` comes to here, by what an artifact depends on alone: a run may accumulate, or not."""
    parameters = list(model.parameters())
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    weights = estimate(
        sum(each.numel() for each in parameters),
        config.precision,
        state_tensors=state_elements(groups) / max(trained, 1),
        activations=0,
        wide_gradients=False,
        num_trained=trained,
    )
    return kept_activations(
        config.compile.activations,
        memory=device_memory(kind),
        rest=weights.total - weights.gradients,
        block=block_activations(
            model_config, config.precision, config.training.batch_size * config.model.max_seq_length
        ),
        layers=model_config.num_hidden_layers,
    )


def kept_activations(asked: str, *, memory: int | None, rest: int, block: int, layers: int) -> str:
    """ "all" or "dear", as for `compile.activations`: as asked, or for "auto" what is expected to be faster.

    `memory`: bytes of the device (None: nothing is known, keep all); `rest`: of weights and optimizer; `block`: of
    what one of the `layers` keeps.
    """
    if asked != "auto":
        return asked
    missing = 0.0 if memory is None else rest + layers * block - FILLED * memory
    return "dear" if missing * ONE_IN > layers * block else "all"


def block_activations(model_config: Any, precision: PrecisionPolicy, tokens: int) -> int:
    """Bytes that a Llama-like block keeps of so many tokens when it keeps all.

    The residual stream before and behind attention, both norms' results, queries, keys, values, what attention gives,
    and the MLP's gate, up and their product.
    """
    compute, residual = (BITS[name] // 8 for name in (precision.compute, precision.residual))
    heads = model_config.num_attention_heads + model_config.num_key_value_heads
    inside = 2 * model_config.hidden_size + 2 * heads * model_config.head_dim + 3 * model_config.intermediate_size
    return tokens * (inside * compute + 2 * model_config.hidden_size * residual)


def device_memory(kind: str) -> int | None:
    """Bytes of the GPU; None of a CPU, whose memory is nobody's own."""
    if kind == "cpu":
        return None
    import torch

    return torch.cuda.get_device_properties(0).total_memory
