"""What the manifest says of an MLIR module: every argument and result by name and role, and what may share memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from compiled.objective import DISTILL_TERMS, TERMS
from compiled.regions import RegionSpec, TensorSpec
from compiled.schedule import Schedule
from compiled.teacher import TEACHER

Role = Literal[
    "parameter",  # a weight, or its new value
    "master",  # the wider copy of one
    "moment",  # the optimizer's state of one
    "state",  # what a backend remembers
    "gradient",
    "batch",  # tokens, labels, their weights in the loss
    "table",  # cos, sin, articles: the same in every step, or made of the batch
    "hyper-parameter",
    "activation",
    "loss",
]
# Names that regions give to what is no tensor of the model or of its optimizer.
_FIXED: dict[str, Role] = {
    **dict.fromkeys(("input_ids", "labels", "grad_scale", "first_row"), "batch"),
    **dict.fromkeys(("cos", "sin", "articles"), "table"),
    **dict.fromkeys(("hyperparameters", "grad_coef", "totals", *TERMS, *DISTILL_TERMS), "hyper-parameter"),
    **dict.fromkeys(("loss", "accuracy", "done"), "loss"),
}
Roles = dict[str, dict[str, Role]]  # region → name → role


@dataclass(frozen=True)
class Value:
    """One argument or result of a module's function."""

    name: str
    role: Role
    dtype: str
    shape: tuple[int, ...]


@dataclass
class ModuleSpec:
    """One entry of the manifest's table of modules.

    `donations`: pairs (argument, result) by position: the result is the argument's new value, and may take its memory
    once the function has returned. `bytes` of the text; `seconds` of tracing and lowering.
    """

    name: str
    function: str
    arguments: list[Value]
    results: list[Value]
    donations: list[tuple[int, int]] = field(default_factory=list)
    file: str = ""
    sha256: str = ""
    bytes: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "ModuleSpec":
        sides = {
            side: [Value(**(value | {"shape": tuple(value["shape"])})) for value in entry[side]]
            for side in ("arguments", "results")
        }
        pairs = [(argument, result) for argument, result in entry["donations"]]
        return cls(**{**entry, **sides, "donations": pairs})


def roles_of(schedule: Schedule) -> Roles:
    """Region → name → role, of the model's and the optimizer's tensors, as the schedule names them."""
    roles: Roles = {}
    for entry in (schedule.embed, *schedule.blocks, schedule.head):
        known = _own(entry)
        known.update(dict.fromkeys([f"new_{name}" for name in entry["state"]], "state"))
        for part in ("forward", "backward", "evaluate", "train"):
            if entry.get(part):
                roles.setdefault(entry[part], {}).update(known)
    for part in schedule.teacher.get("parts", ()):
        roles.setdefault(part["forward"], {}).update(_own(part))
    if schedule.teacher:
        roles[schedule.head["train"]].update(_own(schedule.teacher["head"], TEACHER))
    for group in schedule.updates:
        known = dict.fromkeys(group["state"], "parameter")
        for parameter, states in group["state"].items():
            known[f"master_{parameter}"] = "master"
            known.update(dict.fromkeys([f"{name}_{parameter}" for name in states], "moment"))
        for region in (group["direct"], group["summed"], *group.get("totals", {}).values()):
            roles.setdefault(region, {}).update(known)
    return roles


def _own(entry: Mapping[str, Any], prefix: str = "") -> dict[str, Role]:
    """A part's parameters and state by the names its regions give them."""
    known: dict[str, Role] = dict.fromkeys([f"{prefix}{name}" for name in entry["parameters"]], "parameter")
    known.update(dict.fromkeys([f"{prefix}{name}" for name in entry["state"]], "state"))
    return known


def module_of(spec: RegionSpec, roles: Mapping[str, Role]) -> ModuleSpec:
    """The module of a region: its inputs; its outputs, then the new value of each input that it writes in place."""
    arguments = [_value(each, roles) for each in spec.inputs]
    results = [_value(each, roles) for each in spec.outputs]
    positions = mutated_positions(spec)
    donations = [(position, len(results) + index) for index, position in enumerate(positions)]
    new = [replace(arguments[position], name=f"new_{arguments[position].name}") for position in positions]
    return ModuleSpec(spec.name, spec.name, arguments, [*results, *new], donations)


def mutated_positions(spec: RegionSpec) -> list[int]:
    """Where the inputs that a region writes in place stand among its inputs."""
    return [index for index, each in enumerate(spec.inputs) if each.name in spec.mutated]


def _value(spec: TensorSpec, roles: Mapping[str, Role]) -> Value:
    role = roles.get(spec.name) or _FIXED.get(spec.name)
    if role is None:
        role = "gradient" if spec.name.startswith(("grad_", "sum_")) else "activation"
    return Value(spec.name, role, spec.dtype, spec.shape)
