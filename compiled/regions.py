"""What a region is: a pure piece of the train step with named, fixed-shape tensors going in and coming out.

`TensorSpec` and `RegionSpec` are plain data and live in the artifact's manifest. `Region` is the runnable thing:
machine code plus its spec. Machine code does not look at what it is given (a wrong stride computes a wrong number in
silence), so `Region.check` compares every input with the spec; the program calls it on its first step, when all
buffers have taken their places.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from backends.errors import UserError

RunFunction = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape, dtype and stride (elements) of one input or output of a region."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    stride: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "TensorSpec":
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name, tuple(map(int, tensor.shape)), dtype, tuple(map(int, tensor.stride())))

    @property
    def bytes(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count * getattr(torch, self.dtype).itemsize

    def matches(self, tensor: Tensor, device_type: str) -> bool:
        if tensor.device.type != device_type or str(tensor.dtype) != f"torch.{self.dtype}":
            return False
        if tuple(tensor.shape) != self.shape:
            return False
        # the stride of an extent of 1 (or of an empty tensor) addresses nothing and may be anything
        pairs = zip(self.shape, tensor.stride(), self.stride, strict=True)
        return 0 in self.shape or all(extent == 1 or actual == expected for extent, actual, expected in pairs)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} stride {list(self.stride)}"


@dataclass
class RegionSpec:
    """One entry of the manifest's region table.

    `mutated` names the inputs a region writes in place. `flops` counts the matrix products of one run (2mkn), `bytes`
    every input and output once, `kernels` what the compiler launched for it, `seconds` how long lowering took.
    """

    name: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    mutated: list[str] = field(default_factory=list)
    flops: int = 0
    nodes: int = 0
    kernels: int = 0
    seconds: float = 0.0
    file: str = ""
    sha256: str = ""

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in (*self.inputs, *self.outputs))

    @property
    def saved_bytes(self) -> int:
        return sum(spec.bytes for spec in self.outputs if spec.name.startswith("saved_"))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"bytes": self.bytes}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "RegionSpec":
        fields = {key: value for key, value in entry.items() if key in cls.__dataclass_fields__}
        for side in ("inputs", "outputs"):
            fields[side] = [
                TensorSpec(spec["name"], tuple(spec["shape"]), spec["dtype"], tuple(spec["stride"]))
                for spec in entry[side]
            ]
        return cls(**fields)


class Region:
    """Machine code of one region, ready to run; `region(tensors)` takes the inputs in the order of the spec."""

    def __init__(self, spec: RegionSpec, run: RunFunction) -> None:
        self.spec = spec
        self.run = run

    def __call__(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        return self.run(tensors)

    def check(self, tensors: Sequence[Tensor], device_type: str) -> None:
        """Compare every input with the manifest; raises `UserError` naming the first that differs and both sides."""
        if len(tensors) != len(self.spec.inputs):
            raise UserError(
                f"Region '{self.spec.name}' takes {len(self.spec.inputs)} tensors, got {len(tensors)}: "
                "the artifact was made for another model; compile again."
            )
        for spec, tensor in zip(self.spec.inputs, tensors, strict=True):
            if not spec.matches(tensor, device_type):
                given = TensorSpec.of(spec.name, tensor)
                raise UserError(
                    f"Region '{self.spec.name}' expects {spec.name} as {spec} on {device_type}, got {given} on "
                    f"{tensor.device.type}: the artifact was made for another model or batch; compile again."
                )
