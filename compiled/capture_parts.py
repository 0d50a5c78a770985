"""The parts of the step that are not a stage: the head with its loss, and the optimizer's update.

The head computes logits a chunk of tokens at a time, so that full logits never exist; the program runs it once for
each chunk. Loss = Σ grad_scale · CE (objective.py), and grad_scale comes in as a tensor: a divisor known to the trace
would be baked in.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from backends.precision import PrecisionPolicy, as_torch
from compiled.capture import Captured, Sources, capture_function
from compiled.objective import hits_sum, loss_and_objective, loss_sum
from compiled.stages import Stage, StagedModel, canonical_names, stage_of


class Optimizer(Protocol):
    """A pure update rule; every number that may change between runs is in `hyper`, a 0-d tensor each."""

    @property
    def key(self) -> str:
        """Equal for two rules that trace to the same graph."""

    @property
    def hyperparameter_names(self) -> Sequence[str]: ...

    def state_shapes(self, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """State → shape, for a parameter of `shape`."""

    def update_group(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Tensor]],
        hypers: Mapping[str, Mapping[str, Tensor]],
    ) -> Mapping[str, tuple[Tensor, Mapping[str, Tensor]]]:
        """New parameter and state of several tensors, by name."""


class _Head(nn.Module):
    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.head(self.norm(hidden_states))


def head_stage(model: StagedModel) -> Stage:
    """Final norm and output projection as one stage."""
    names = model.stages()
    paths = {"norm": names.norm, "head": names.head}
    module = _Head(model.get_submodule(names.norm), model.get_submodule(names.head))
    return stage_of("head", module, canonical_names(model), paths)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gradients that are summed (over chunks, microbatches) are summed in at least float32."""
    return torch.promote_types(dtype, torch.float32)


def capture_head(
    stage: Stage,
    sources: Sources,
    policy: PrecisionPolicy,
    tokens: int,
    hidden_size: int,
    chunks: int,
    loss_terms: Sequence[str] = (),
) -> list[Captured]:
    """Two regions over one chunk of tokens: `head_train` (loss and gradients) and `head_evaluate` (loss and accuracy).

    Inputs: parameters, state, hidden_states [T/chunks, H], labels [T/chunks], grad_scale [T/chunks], and first_row, the
    chunk's first token within the step, where a backend counts from it. With several
    chunks `head_train` adds its parameter gradients onto `sum_<parameter>` buffers in place; with one it returns them.
    `loss_terms`: further inputs of `head_train`, 0-d; its `loss` is then [2], cross entropy and what is minimised.
    """
    rows, logits_dtype = tokens // chunks, as_torch(policy.logits)
    tensors = sources.stage_tensors(stage, with_grad=False)
    trained = [slot.local for slot in stage.trained_parameters()]
    inputs = tensors | {
        "hidden_states": sources.empty((rows, hidden_size), as_torch(policy.residual)),
        "labels": sources.empty((rows,), torch.int64),
        # 1/N in bfloat16 would be off by up to 0.4 %
        "grad_scale": sources.empty((rows,), accumulation_dtype(as_torch(policy.logits))),
    }
    inputs |= sources.first_row(stage)
    sums = {
        f"sum_{name}": sources.empty(tensors[name].shape, accumulation_dtype(tensors[name].dtype)) for name in trained
    }
    state_names = list(stage.reduce)

    def train(*flat: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(train_inputs, flat, strict=True))
        with torch.enable_grad():
            leaves = {name: named[name].detach().requires_grad_() for name in ("hidden_states", *trained)}
            logits, new_state = stage.call(
                {key: leaves.get(key, named[key]) for key in tensors},
                leaves["hidden_states"],
                first_row=named.get("first_row"),
            )
            given = (logits.to(logits_dtype), named["labels"], named["grad_scale"])
            terms = {name: named[name] for name in loss_terms}
            loss = loss_and_objective(*given, terms) if terms else loss_sum(*given)
            objective = loss[1] if terms else loss
            gradients = dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))
        results = [loss.detach(), gradients.pop("hidden_states")]
        results += [new_state[key] if key in new_state else named[key].clone() for key in state_names]
        if chunks == 1:
            return (*results, *gradients.values())
        for name, gradient in gradients.items():
            named[f"sum_{name}"].copy_(named[f"sum_{name}"] + gradient)
        return tuple(results)

    def evaluate(*flat: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, flat, strict=True))
        weights = {key: named[key] for key in tensors}
        logits, _ = stage.call(weights, named["hidden_states"], first_row=named.get("first_row"))
        given = (logits.to(logits_dtype), named["labels"], named["grad_scale"])
        return loss_sum(*given), hits_sum(*given)

    terms_given = {name: sources.empty((), inputs["grad_scale"].dtype) for name in loss_terms}
    train_inputs = inputs | ({} if chunks == 1 else sums) | terms_given
    outputs = ["loss", "grad_hidden_states", *(f"new_{name}" for name in state_names)]
    outputs += [f"grad_{name}" for name in trained] if chunks == 1 else []
    stage.module.train()
    train_region = capture_function(
        "head_train", train, train_inputs, outputs, mutated=[] if chunks == 1 else list(sums)
    )
    stage.module.eval()
    evaluate_region = capture_function("head_evaluate", evaluate, inputs, ["loss", "accuracy"])
    stage.module.train()
    return [train_region, evaluate_region]


def capture_update(
    name: str,
    optimizers: Mapping[str, Optimizer],
    parameters: dict[str, Tensor],
    gradient_dtypes: dict[str, torch.dtype],
    policy: PrecisionPolicy,
    sources: Sources,
    columns: int,
    skips: bool = False,
) -> Captured:
    """The update of a group of parameters, each by its optimizer, in place, one region.

    Inputs: `hyperparameters` [number of parameters, `columns`] (a row each, so that every parameter may have its own
    rate and decay; the first columns are its optimizer's), `grad_coef` 0-d (clipping), then for each parameter p: p,
    `grad_p`, `<state>_p`…, `master_p` if there is one. Arithmetic is done in at least float32; output: a copy of
    grad_coef (a region must return something). `skips`: a grad_coef that is not finite leaves everything as it is.
    """
    with_master = policy.master != "none"
    work = as_torch(policy.master) if with_master else accumulation_dtype(as_torch(policy.parameters))
    inputs = {
        "hyperparameters": sources.empty((len(parameters), columns), work),
        "grad_coef": sources.empty((), work),
    }
    states = {each: optimizers[each].state_shapes(tuple(tensor.shape)) for each, tensor in parameters.items()}
    mutated = []
    for parameter_name, tensor in parameters.items():
        inputs[parameter_name] = sources.like(tensor)
        inputs[f"grad_{parameter_name}"] = sources.empty(tensor.shape, gradient_dtypes[parameter_name])
        for state, shape in states[parameter_name].items():
            inputs[f"{state}_{parameter_name}"] = sources.empty(shape, as_torch(policy.moments))
        if with_master:
            inputs[f"master_{parameter_name}"] = sources.empty(tensor.shape, as_torch(policy.master))
        mutated += [parameter_name, *(f"{state}_{parameter_name}" for state in states[parameter_name])]
        mutated += [f"master_{parameter_name}"] if with_master else []
    rows = {parameter_name: row for row, parameter_name in enumerate(parameters)}

    def update(*flat: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, flat, strict=True))
        applied = torch.isfinite(named["grad_coef"]) if skips else None
        for optimizer, members in _by_optimizer(optimizers, parameters):
            updated = optimizer.update_group(
                {each: named[f"master_{each}" if with_master else each].to(work) for each in members},
                {each: named[f"grad_{each}"].to(work) * named["grad_coef"] for each in members},
                {each: {key: named[f"{key}_{each}"].to(work) for key in states[each]} for each in members},
                {each: _numbers(optimizer, named["hyperparameters"], rows[each]) for each in members},
            )
            for each in members:
                new_parameter, new_state = updated[each]
                if applied is not None:
                    # from the master where there is one: the parameter, its rounding, need not be read
                    new_parameter = torch.where(
                        applied, new_parameter, named[f"master_{each}" if with_master else each]
                    )
                for key, value in new_state.items():
                    kept = named[f"{key}_{each}"]
                    kept.copy_(value if applied is None else torch.where(applied, value, kept))
                if with_master:
                    named[f"master_{each}"].copy_(new_parameter)
                named[each].copy_(new_parameter)
        return (named["grad_coef"] + 0,)

    return capture_function(name, update, inputs, ["done"], mutated)


def _by_optimizer(optimizers: Mapping[str, Optimizer], names: Iterable[str]) -> list[tuple[Optimizer, list[str]]]:
    """The names each optimizer updates together, in the order in which they come."""
    found: dict[str, tuple[Optimizer, list[str]]] = {}
    for name in names:
        found.setdefault(optimizers[name].key, (optimizers[name], []))[1].append(name)
    return list(found.values())


def _numbers(optimizer: Optimizer, table: Tensor, row: int) -> dict[str, Tensor]:
    return {key: table[row, column] for column, key in enumerate(optimizer.hyperparameter_names)}
