"""A frozen teacher's forward as regions: each distinct part once, and no backward."""

from typing import Any

import torch
from torch import Tensor, nn

from compiled.capture import Captured, Sources, capture_stage
from compiled.capture_parts import head_stage
from compiled.stages import Stage, StagedModel, make_stage, slots, structure
from compiled.teacher import TEACHER


def capture_teacher(
    teacher: StagedModel, ids: dict[str, Tensor], shared: dict[str, Tensor], sources: Sources
) -> tuple[dict[str, Captured], dict[str, Any], Stage]:
    """The regions of its forward by name, their schedule (`parts`, in order, and `head`), and its head.

    `ids`: input_ids [B, S]; `shared`: what every block is called with. The model is put into evaluation.
    """
    assert isinstance(teacher, nn.Module)
    teacher.eval().requires_grad_(False)
    names, regions, flowing = teacher.stages(), dict[str, Captured](), ids
    parts, known = [], dict[str, str]()
    for path in (names.embed, *names.blocks):
        stage = make_stage(teacher, path)
        kind = structure(stage.module)
        if kind not in known:
            known[kind] = (
                f"{TEACHER}embed_forward" if path == names.embed else f"{TEACHER}block_{len(known) - 1}_forward"
            )
            captured, _ = capture_stage(known[kind].removesuffix("_forward"), stage, flowing, sources)
            regions[known[kind]] = captured
            output = captured.spec.outputs[0]
            flowing = {"hidden_states": sources.empty(output.shape, getattr(torch, output.dtype))} | shared
        parts.append({"forward": known[kind]} | slots(stage))
    head = head_stage(teacher)
    return regions, {"parts": parts, "head": slots(head)}, head
