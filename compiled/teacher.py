"""A frozen teacher beside the model that is trained: its forward by regions of the artifact.

They give its last hidden states; the head makes logits of them a chunk of tokens at a time, beside the student's own.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from backends.errors import UserError
from compiled.binding import Binding

TEACHER = "teacher_"  # what the names of its regions, and of its tensors in the head, begin with


class Teacher:
    """Runs the teacher's regions of an artifact over `model`, which lies on the device in its final dtypes.

    UserError when the model's parameters are not those that the artifact was made for.
    """

    def __init__(self, binding: Binding, schedule: Mapping[str, Any], model: nn.Module, length: int) -> None:
        self.run = binding.run
        tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())

        def inputs(entry: Mapping[str, Any]) -> dict[str, Tensor]:
            named = {local: full for kind in ("parameters", "state") for local, full in entry[kind].items()}
            absent = sorted(set(named.values()) - tensors.keys())
            if absent:
                raise UserError(
                    f"The artifact was made for another teacher (missing here: {absent[:3]}). Compile again."
                )
            return {local: tensors[full] for local, full in named.items()}

        self.parts = [(part["forward"], inputs(part)) for part in schedule["parts"]]
        self.head_inputs = {f"{TEACHER}{local}": tensor for local, tensor in inputs(schedule["head"]).items()}
        cos, sin = model.rotary_tables(length, next(model.parameters()).device)  # type: ignore[operator]
        self.tables = {"cos": cos, "sin": sin}

    def states(self, input_ids: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head's input by token: the last hidden states [B, S, H]. `shared`: what the student's blocks have too."""
        flowing, shared = {"input_ids": input_ids}, dict(shared) | self.tables
        for region, inputs in self.parts:
            flowing = {"hidden_states": self.run(region, inputs | shared | flowing)["output"]}
        return {f"{TEACHER}hidden_states": flowing["hidden_states"]}
