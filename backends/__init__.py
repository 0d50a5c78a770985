"""How y = x Wᵀ and attention's two matmuls are computed. One file here = one backend, found by its file name.

Listing backends imports none of them, and importing this package imports no torch: `--help` stays fast.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.errors import UserError, unknown

if TYPE_CHECKING:
    from backends.base import Backend
    from backends.layers import BackendAttention, BackendLinear
    from backends.routing import Plan, plan, route
    from backends.routing_rules import LayerInfo, Rule
    from backends.rules_file import read_rules
    from backends.rules_forms import RulesFile
    from backends.state import collect_state

__all__ = [
    "Backend",
    "BackendAttention",
    "BackendLinear",
    "LayerInfo",
    "Plan",
    "Rule",
    "RulesFile",
    "UserError",
    "available",
    "collect_state",
    "load",
    "plan",
    "read_rules",
    "route",
]

_LAZY = {
    "Backend": "backends.base",
    "BackendAttention": "backends.layers",
    "BackendLinear": "backends.layers",
    "LayerInfo": "backends.routing_rules",
    "Plan": "backends.routing",
    "Rule": "backends.routing_rules",
    "RulesFile": "backends.rules_forms",
    "collect_state": "backends.state",
    "plan": "backends.routing",
    "read_rules": "backends.rules_file",
    "route": "backends.routing",
}
# The source says whether a file is a backend, so the house's own files (routing.py, layers.py, ...) need no list.
_DEFINES_BACKEND = re.compile(r"^class \w+\((?:[\w.]+\.)?Backend\)", re.MULTILINE)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'backends' has no attribute '{name}'")


@cache
def available() -> tuple[str, ...]:
    """Names of the backends that ship here: the files of this folder that define a subclass of Backend."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple(file.stem for file in files if _DEFINES_BACKEND.search(file.read_text(encoding="utf-8")))


def load(name: str, /, **options: Any) -> Backend:
    """Build the backend called `name`: a file name of this folder, or `package.module:Class` from outside.

    `options` are the fields of the backend's Config; an unknown field or a value of another type is a UserError.
    """
    from backends.base import Backend
    from backends.outside_class import outside_class

    backend_class = outside_class(name, Backend, "backend") if ":" in name else _house_class(name)
    return backend_class.from_options(options)


def _house_class(name: str) -> type[Backend]:
    from backends.base import Backend
    from backends.outside_class import defined_in

    if name not in available():
        raise unknown("backend", name, available())
    module = importlib.import_module(f"backends.{name}")
    classes = defined_in(module, Backend)
    camel_case = "".join(part.capitalize() for part in name.split("_"))
    found = [cls for cls in classes if cls.__name__ == camel_case] or classes
    assert len(found) == 1, f"{module.__file__} must define one Backend subclass, or one called {camel_case}"
    return found[0]
