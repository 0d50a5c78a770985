"""Models from a config alone: without weights, or with random ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from backends.errors import UserError
from backends.precision import as_torch
from backends.seeding import generator_of
from backends.state import reset_state
from modelzoo.configuration_transformer import ConfigurationTransformer
from modelzoo.stored_layers import FIELD, restore


def build_meta(config: Any, dtype: torch.dtype | str = torch.float32) -> Any:
    """The model of a zoo config with every parameter on the meta device: shapes and dtypes, no memory."""
    dtype = as_torch(dtype) if isinstance(dtype, str) else dtype
    model_class = ConfigurationTransformer().family_of(config).model()
    config = copy.deepcopy(config)  # transformers writes into the config that it builds from
    config.dtype = dtype
    with torch.device("meta"), _default_dtype(dtype):
        model = model_class(config)
        restore(model, config)
    return model


def build_model(
    config: Any,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    seed: int = 42,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The model of a zoo config with random weights: normal with the config's initializer_range, as transformers does.

    Every parameter is drawn in float32 on the CPU from its own generator, which `seed` and the parameter's name decide:
    the numbers depend neither on the device, nor on how many there are, nor on other parameters; a model in another
    dtype has the same weights, rounded. As many are drawn at a time as PyTorch may use threads, since one thread draws
    each; no more than these are held twice. `progress(done, total)` is called with numbers drawn.
    """
    if getattr(config, FIELD, None):
        raise UserError(f"This config tells of {FIELD}: it has to start from the weights of its own folder.")
    model = build_meta(config, dtype)
    parameters = dict(model.named_parameters())
    total, done = sum(parameter.numel() for parameter in parameters.values()), 0

    def drawn(name: str) -> tuple[str, Tensor]:
        values = _initial_values(model, name, tuple(parameters[name].shape), seed)
        return name, values.to(device=device, dtype=parameters[name].dtype)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, values in pool.map(drawn, parameters):
            put_parameter(model, name, values)
            done += values.numel()
            if progress is not None:
                progress(done, total)
    finish(model)
    return model


def put_parameter(model: nn.Module, name: str, values: Tensor) -> None:
    """Let `values` be the parameter called `name`, in place of the one on the meta device."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    trained = getattr(module, attribute).requires_grad
    setattr(module, attribute, nn.Parameter(values, requires_grad=trained))


def finish(model: PreTrainedModel) -> None:
    """Bring a model that was built on the meta device to life, once its parameters are in place."""
    model.tie_weights()
    reset_state(model)


def _initial_values(model: PreTrainedModel, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """float32 on the CPU: weights normal, the padding token's embedding and biases 0, norms 1."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear | nn.Embedding):
        return torch.ones(shape)
    if attribute == "bias":
        return torch.zeros(shape)
    values = torch.empty(shape).normal_(0.0, model.config.initializer_range, generator=generator_of(seed, name))
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        values[module.padding_idx] = 0.0
    return values


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
