"""Model families the zoo knows. One file here = one family: a module with a `FAMILY`. Nothing to register."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family's Hugging Face config and zoo config stand for each other."""

    hf_config: type[Any]  # matched exactly: a subclass is another family
    zoo_config: type[Any]
    architectures: Mapping[str, str]  # Hugging Face class name -> zoo class name
    zoo_arguments: tuple[str, ...]  # fields that the zoo config has on top
    check: Callable[[Any], None]  # raises UserError for what the zoo's model does not compute
    model: Callable[[], type[Any]]  # the zoo class for causal language modelling, imported when asked for


@cache
def discover() -> tuple[Family, ...]:
    """The families of this folder, in the order of their file names."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_"))
    return tuple(importlib.import_module(f"modelzoo.families.{name}").FAMILY for name in names)
