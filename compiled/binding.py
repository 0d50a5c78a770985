"""Regions bound to a model's tensors: which tensor goes into which input, checked once against the manifest."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from backends.errors import UserError
from compiled.artifact import Artifact
from compiled.joining import lay_together

# One part of the schedule: its regions, and its parameters and state by local name → full name.
Entry = Mapping[str, Any]


class Binding:
    """Machine code of an artifact over the parameters and buffers of `model`, which it reads and writes in place.

    Raises `UserError` when the model's parameters are not those the artifact was made for. Parameters that regions take
    together get memory side by side: they stay the same objects with the same values.
    """

    def __init__(self, artifact: Artifact, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self.device_type = artifact.device_type
        schedule = artifact.manifest["schedule"]
        _check_names(schedule, self.tensors, {name for name, _ in model.named_parameters()})
        self.joint = lay_together(schedule["blocks"], self.tensors)
        self.regions = artifact.load_regions()
        self._checked: set[str] = set()

    def run(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run region `name` on `tensors`, picked by name; its first run compares them with the manifest."""
        region = self.regions[name]
        inputs = [tensors[spec.name] for spec in region.spec.inputs]
        if name not in self._checked:
            region.check(inputs, self.device_type)
            self._checked.add(name)
        outputs = region(inputs)
        return {spec.name: output for spec, output in zip(region.spec.outputs, outputs, strict=True)}

    def inputs(self, entry: Entry) -> dict[str, Tensor]:
        """Parameters, alone and joint, and state of a part, by local name."""
        own = {local: self.tensors[full] for slots in ("parameters", "state") for local, full in entry[slots].items()}
        joint = {name: self.joint[entry["parameters"][members[0]]] for name, members in entry["joint"].items()}
        return own | joint

    def gradients(self, entry: Entry, results: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a part's trained parameters, by full name, out of its backward's results; of joint ones the rows."""
        found = {local: results[f"grad_{local}"] for local in entry["trained"] if f"grad_{local}" in results}
        for name, members in entry["joint"].items():
            if f"grad_{name}" in results:  # frozen ones have none
                rows = [len(self.tensors[entry["parameters"][local]]) for local in members]
                found |= zip(members, results[f"grad_{name}"].split(rows), strict=True)
        return {entry["parameters"][local]: found[local] for local in entry["trained"]}

    def input_dtype(self, region: str, name: str) -> torch.dtype:
        """The dtype in which `region` takes its input `name`."""
        spec = next(spec for spec in self.regions[region].spec.inputs if spec.name == name)
        dtype: torch.dtype = getattr(torch, spec.dtype)
        return dtype


def _check_names(schedule: Mapping[str, Any], tensors: Mapping[str, Tensor], parameters: set[str]) -> None:
    entries = (schedule["embed"], schedule["head"], *schedule["blocks"])
    named = {full for entry in entries for slots in ("parameters", "state") for full in entry[slots].values()}
    absent, strange = sorted(named - tensors.keys()), sorted(parameters - named)
    if absent or strange:
        raise UserError(
            "The artifact was made for a model with other parameters "
            f"(missing here: {absent[:3]}; unknown to it: {strange[:3]}). Compile again for this model."
        )
