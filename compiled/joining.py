"""Which parameters of a stage a region takes as one tensor, and how a model's parameters come to lie that way.

Weights of layers that read the same input lie one below the other in one storage, and each parameter is a view of its
rows: a region computes one product of all, and its one gradient's rows are the parameters' gradients. Everything else
(update, masters, reduction, checkpoints) goes on by parameter and never knows.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backends.joint import joined_kinds, layers_of_one_input, may_be_one_product
from compiled.stages import Stage, StagedModel

ALIGNED = 16  # bytes: what a GPU's kernels load at once; a tensor that begins elsewhere would be copied on every call


def join(stage: Stage, model: StagedModel) -> None:
    """Let the stage take together whatever can be one product, as `joint_weight` and `joint_bias` of its module."""
    assert isinstance(model, nn.Module)
    uses = Counter(id(each) for _, each in model.named_parameters(remove_duplicate=False))
    for path, module in stage.module.named_modules():
        layers = layers_of_one_input(module)
        if not layers or not may_be_one_product(layers):
            continue
        kinds = joined_kinds(layers[0])
        taken = [getattr(layer, name) for layer in layers for name in kinds.values()]
        if not all(uses[id(each)] == 1 and each.nbytes % ALIGNED == 0 for each in taken):
            continue
        for kind, name in kinds.items():
            stage.joint[f"{path}.joint_{kind}"] = [f"{path}.{layer}.{name}" for layer in module.same_input]


def lay_together(entries: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The joint tensors of schedule entries, by the name of their first parameter, which lies in it as all others do.

    Where the parameters do not lie so yet, their memory is exchanged, a joint tensor at a time.
    """
    joint = {}
    for entry in entries:
        for members in entry["joint"].values():
            full = [entry["parameters"][local] for local in members]
            joint[full[0]] = _together([tensors[name] for name in full])
    return joint


def _together(parameters: Sequence[Tensor]) -> Tensor:
    first = parameters[0].detach()
    shape = (sum(len(each) for each in parameters), *first.shape[1:])
    if all(_follows(one, other) for one, other in itertools.pairwise(parameters)):
        return first.as_strided(shape, first.stride(), first.storage_offset())
    joint = torch.cat([each.detach() for each in parameters])
    for parameter, rows in zip(parameters, joint.split([len(each) for each in parameters]), strict=True):
        parameter.data = rows
    return joint


def _follows(one: Tensor, other: Tensor) -> bool:
    """Whether `other` begins where `one` ends, in the same memory."""
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same and other.data_ptr() == one.data_ptr() + one.nbytes
