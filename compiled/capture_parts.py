"""The part of the step that is not a stage: the head with its loss.

The head computes logits a chunk of tokens at a time, so that full logits never exist; the program runs it once for
each chunk. Loss = Σ grad_scale · CE (objective.py), and grad_scale comes in as a tensor: a divisor known to the trace
would be baked in.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from backends.precision import PrecisionPolicy, as_torch
from compiled.accumulation import accumulation_dtype
from compiled.capture import Captured, Sources, capture_function
from compiled.objective import hits_sum, loss_and_gradient, loss_sum
from compiled.stages import Stage, StagedModel, canonical_names, stage_of
from compiled.teacher import TEACHER


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


def capture_head(
    stage: Stage,
    sources: Sources,
    policy: PrecisionPolicy,
    tokens: int,
    hidden_size: int,
    chunks: int,
    loss_terms: Sequence[str] = (),
    teacher: Stage | None = None,
) -> list[Captured]:
    """Two regions over one chunk of tokens: `head_train` (loss and gradients) and `head_evaluate` (loss and accuracy).

    Inputs: parameters, state, hidden_states [T/chunks, H], labels [T/chunks], grad_scale [T/chunks], and first_row, the
    chunk's first token within the step, where a backend counts from it. With several
    chunks `head_train` adds its parameter gradients onto `sum_<parameter>` buffers in place; with one it returns them.
    `loss_terms`: further inputs of `head_train`, 0-d; its `loss` is then [2], cross entropy and what is minimised.
    `teacher`: the head of a frozen model; `head_train` then takes its parameters and hidden states too, by names that
    begin with `teacher_`, and its logits exist for a chunk only, as the model's own do.
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
            terms = {name: named[name] for name in loss_terms}
            taught = None if teacher is None else _teacher_logits(teacher, named).to(logits_dtype)
            loss, gradient = loss_and_gradient(
                logits, logits_dtype, named["labels"], named["grad_scale"], terms, taught
            )
            found = torch.autograd.grad(logits, list(leaves.values()), gradient, materialize_grads=True)
            gradients = dict(zip(leaves, found, strict=True))
        results = [loss, gradients.pop("hidden_states")]
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
    if teacher is not None:
        train_inputs |= _teacher_inputs(teacher, sources, rows, as_torch(policy.residual))
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


def _teacher_inputs(teacher: Stage, sources: Sources, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {f"{TEACHER}{local}": each for local, each in sources.stage_tensors(teacher, with_grad=False).items()}
    width = tensors[f"{TEACHER}norm.weight"].shape[0]
    return tensors | {f"{TEACHER}hidden_states": sources.empty((rows, width), dtype)}


def _teacher_logits(teacher: Stage, named: Mapping[str, Tensor]) -> Tensor:
    own = {name.removeprefix(TEACHER): each for name, each in named.items() if name.startswith(TEACHER)}
    hidden_states = own.pop("hidden_states")
    return teacher.call(own, hidden_states)[0]
