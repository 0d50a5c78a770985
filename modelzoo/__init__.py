"""Models of the zoo: named configs, building, loading, saving. Importing this package imports no torch."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelzoo.build import build_meta, build_model
    from modelzoo.checkpoint_reading import load_model
    from modelzoo.checkpoint_writing import save_configs, save_model
    from modelzoo.config_reading import load_config

__all__ = ["build_meta", "build_model", "load_config", "load_model", "named_configs", "save_configs", "save_model"]

_LAZY = {
    "build_meta": "modelzoo.build",
    "build_model": "modelzoo.build",
    "load_config": "modelzoo.config_reading",
    "load_model": "modelzoo.checkpoint_reading",
    "save_configs": "modelzoo.checkpoint_writing",
    "save_model": "modelzoo.checkpoint_writing",
}
CONFIG_FOLDER = Path(__file__).parent / "configs"


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'modelzoo' has no attribute '{name}'")


def named_configs() -> tuple[str, ...]:
    """Names of the configs that ship here: the files modelzoo/configs/NAME.json."""
    return tuple(sorted(file.name.removesuffix(".json") for file in CONFIG_FOLDER.glob("*.json")))
