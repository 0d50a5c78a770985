"""The parts of the step that are not a stage: the head with its loss, and the optimizer's update.

The head computes logits a chunk of tokens at a time, so that full logits never exist; the program runs it once for
each chunk. Loss = Σ grad_scale · CE, and grad_scale comes in as a tensor: a divisor known to the trace would be baked
in.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from backends.precision import PrecisionPolicy, as_torch
from compiled.capture import Captured, Sources, capture_function
from compiled.stages import Stage, StagedModel, canonical_names, stage_of


class Optimizer(Protocol):
    """A pure per-tensor update rule; every number that may change between runs is in `hyper`, a 0-d tensor each."""

    @property
    def state_names(self) -> Sequence[str]: ...
    @property
    def hyperparameter_names(self) -> Sequence[str]: ...

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


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


def loss_sum(logits: Tensor, labels: Tensor, grad_scale: Tensor) -> Tensor:
    """Σ grad_scale · CE over tokens: logits [T, V], labels [T], grad_scale [T] → 0-d, in the wider of their dtypes.

    The target's logit is picked by comparing with an index, not by gather: the backward is then one fused elementwise
    pass instead of a scatter into zeros.
    """
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    target = torch.where(vocabulary == labels[:, None], logits, 0).sum(-1)
    return ((torch.logsumexp(logits, -1) - target) * grad_scale).sum()


def hits_sum(logits: Tensor, labels: Tensor, grad_scale: Tensor) -> Tensor:
    """Σ grad_scale over the tokens whose likeliest next token is the label (the first of equals), 0-d."""
    return ((logits.argmax(-1) == labels) * grad_scale).sum()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gradients that are summed (over chunks, microbatches) are summed in at least float32."""
    return torch.promote_types(dtype, torch.float32)


def capture_head(
    stage: Stage, sources: Sources, policy: PrecisionPolicy, tokens: int, hidden_size: int, chunks: int
) -> list[Captured]:
    """Two regions over one chunk of tokens: `head_train` (loss and gradients) and `head_evaluate` (loss and accuracy).

    Inputs: parameters, state, hidden_states [T/chunks, H], labels [T/chunks], grad_scale [T/chunks], and first_row, the
    chunk's first token within the step, where a backend counts from it. With several
    chunks `head_train` adds its parameter gradients onto `sum_<parameter>` buffers in place; with one it returns them.
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
            loss = loss_sum(logits.to(logits_dtype), named["labels"], named["grad_scale"])
            gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
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

    train_inputs = inputs if chunks == 1 else inputs | sums
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
    optimizer: Optimizer,
    parameters: dict[str, Tensor],
    gradient_dtypes: dict[str, torch.dtype],
    policy: PrecisionPolicy,
    sources: Sources,
) -> Captured:
    """The optimizer's update of a group of parameters, in place, one region.

    Inputs: `hyperparameters` [number of parameters, number of hyper-parameters] (a row each, so that every parameter
    may have its own rate and decay), `grad_coef` 0-d (clipping), then for each parameter p: p, `grad_p`, `<state>_p`…,
    `master_p` if there is one. Arithmetic is done in at least float32; output: a copy of grad_coef (a region must
    return something).
    """
    with_master = policy.master != "none"
    work = as_torch(policy.master) if with_master else accumulation_dtype(as_torch(policy.parameters))
    inputs = {
        "hyperparameters": sources.empty((len(parameters), len(optimizer.hyperparameter_names)), work),
        "grad_coef": sources.empty((), work),
    }
    mutated = []
    for parameter_name, tensor in parameters.items():
        inputs[parameter_name] = sources.like(tensor)
        inputs[f"grad_{parameter_name}"] = sources.empty(tensor.shape, gradient_dtypes[parameter_name])
        for state in optimizer.state_names:
            inputs[f"{state}_{parameter_name}"] = sources.empty(tensor.shape, as_torch(policy.moments))
        if with_master:
            inputs[f"master_{parameter_name}"] = sources.empty(tensor.shape, as_torch(policy.master))
        mutated += [parameter_name, *(f"{state}_{parameter_name}" for state in optimizer.state_names)]
        mutated += [f"master_{parameter_name}"] if with_master else []

    def update(*flat: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, flat, strict=True))
        for row, parameter_name in enumerate(parameters):
            hyper = {
                key: named["hyperparameters"][row, column] for column, key in enumerate(optimizer.hyperparameter_names)
            }
            current = named[f"master_{parameter_name}" if with_master else parameter_name].to(work)
            gradient = named[f"grad_{parameter_name}"].to(work) * named["grad_coef"]
            state = {key: named[f"{key}_{parameter_name}"].to(work) for key in optimizer.state_names}
            new_parameter, new_state = optimizer.update(current, gradient, state, hyper)
            for key, value in new_state.items():
                named[f"{key}_{parameter_name}"].copy_(value)
            if with_master:
                named[f"master_{parameter_name}"].copy_(new_parameter)
            named[parameter_name].copy_(new_parameter)
        return (named["grad_coef"] + 0,)

    return capture_function(name, update, inputs, ["done"], mutated)
