"""Small steps to plan: a model folder and settings as on the command line."""

import json
from pathlib import Path
from typing import Any

from apps.training.config import parse
from apps.training.config_schema import TrainConfig
from apps.training.step_plan import plan_step

SCALED = "tests.backends.stateful_backend:ScaledBackend"
FIELDS = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(FIELDS | changes))
    return folder


def settings_of(folder: Path, *more: str) -> TrainConfig:
    given = {"training.batch_size": "2", "model.max_seq_length": "16", "compile.arch": "cpu"}
    given |= dict(argument.partition("=")[::2] for argument in more)
    start = ["command=run"] + ([] if "checkpoint.model_name_or_path" in given else [f"checkpoint.config_name={folder}"])
    return parse([*start, *(f"{key}={value}" for key, value in given.items())])


def key_of(folder: Path, *more: str) -> str:
    return plan_step(settings_of(folder, *more)).spec.key
