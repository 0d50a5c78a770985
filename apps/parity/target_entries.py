"""What `targets=[…]` says: ways to compute one train step. Imports no torch.

An entry is a target's name, or a mapping of it with settings of the section `compile`, and a `name` of its own if
wanted: `{target: mlir, mlir.dialect: stablehlo}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_type_hints

from apps.training.config_schema import CompileConfig
from apps.training.config_yaml import written
from backends.errors import UserError, unknown

NAMES: tuple[str, ...] = get_args(get_type_hints(CompileConfig)["target"])


@dataclass(frozen=True)
class Target:
    """One way to compute the step: what the report calls it, and its settings of the section `compile`."""

    name: str
    settings: Mapping[str, Any]

    @property
    def arguments(self) -> list[str]:
        """As `train_llm.py` takes them."""
        return [f"compile.{key}={written(value)}" for key, value in self.settings.items()]


def read_targets(given: Sequence[Any]) -> list[Target]:
    """The entries of `targets=[…]`, the reference first, each under a name of its own. UserError for another form."""
    if len(given) < 2:
        raise UserError(
            f"targets has {len(given)} entry. Expected two at least, the reference first: targets='[eager, mlir]'."
        )
    targets: list[Target] = []
    for number, value in enumerate(given):
        target = _target(value, f"targets[{number}]")
        same = sum(other.name.partition(" #")[0] == target.name for other in targets)
        targets.append(replace(target, name=f"{target.name} #{same + 1}") if same else target)
    return targets


def _target(value: Any, place: str) -> Target:
    settings = {"target": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    kind = settings.get("target")
    if not isinstance(kind, str):
        raise UserError(
            f"{place} is {value!r}. Expected one of {', '.join(NAMES)}, or {{target: NAME, SETTING: VALUE}}."
        )
    if kind not in NAMES:
        raise unknown(f"target in {place}", kind, NAMES)
    own = ", ".join(f"{key}={each}" for key, each in settings.items() if key not in ("target", "name"))
    name = settings.pop("name", f"{kind}({own})" if own else kind)
    return Target(str(name), settings)
