"""From a name or a folder to a zoo config, with one line for whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.errors import UserError, did_you_mean, unknown
from modelzoo import CONFIG_FOLDER, named_configs

if TYPE_CHECKING:
    from modelzoo.families import Family


def load_config(
    *, config_name: str | Path | None = None, model_name_or_path: str | Path | None = None, **zoo_arguments: Any
) -> Any:
    """The zoo config of a named config or of a Hugging Face model folder; no weights are looked at.

    `config_name`: one of `named_configs()` or a folder with a config.json. `model_name_or_path`: such a folder. Exactly
    one is given. `zoo_arguments`: see ZooLlamaConfig. Raises UserError when there is no such config, it is not valid,
    or the zoo does not have such a model.
    """
    if (config_name is None) == (model_name_or_path is None):
        raise UserError("Please specify exactly one of checkpoint.config_name or checkpoint.model_name_or_path.")
    file = _config_file(config_name, model_name_or_path)
    values = _read_json(file)
    # Only now: transformers takes seconds to import, and a misspelt name is told at once.
    from modelzoo.configuration_transformer import ConfigurationTransformer

    family = _family_of(values, file)
    try:
        config = family.hf_config(**values)
    except Exception as error:  # transformers checks types and shapes, with errors of many kinds and lines
        raise UserError(f"'{file}' is not a valid {family.hf_config.__name__}: {_one_line(error)}") from error
    return ConfigurationTransformer().transform(config, **zoo_arguments)


def _adapter_hint(folder: Path) -> str:
    """What to do with the adapter that lies where a model was looked for; empty when none does."""
    for place in (folder, folder / "adapter"):  # a run with lora.merge=false leaves the second alone
        if (place / "adapter_config.json").is_file():
            return f" '{place}' is a LoRA adapter: apps/merge_lora.py makes a model of it and its base."
    return ""


def _config_file(config_name: str | Path | None, model_name_or_path: str | Path | None) -> Path:
    if config_name is not None and str(config_name) in named_configs():
        return CONFIG_FOLDER / f"{config_name}.json"
    given = config_name if config_name is not None else model_name_or_path
    folder = Path(str(given)).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"The folder '{given}' has no config.json. Expected a Hugging Face model folder.{_adapter_hint(folder)}"
            )
        return folder / "config.json"
    if config_name is not None:
        raise UserError(
            f"Unknown model '{given}' (checkpoint.config_name): neither a named config nor a folder."
            f"{did_you_mean(str(given), named_configs())} Available: {', '.join(named_configs())}."
        )
    hint = "Expected a Hugging Face model folder."
    if str(given) in named_configs():
        hint = f"'{given}' is a named config: use checkpoint.config_name={given}."
    raise UserError(f"There is no folder '{given}' (checkpoint.model_name_or_path). {hint}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read '{file}' as JSON: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"'{file}' holds a {type(values).__name__}. Expected a JSON object with the model's config.")
    return values


def _family_of(values: dict[str, Any], file: Path) -> Family:
    from modelzoo.families import discover

    families = {family.hf_config.model_type: family for family in discover()}
    model_type = values.get("model_type")
    if model_type is None:
        raise UserError(f"'{file}' has no model_type. Expected one of: {', '.join(families)}.")
    if model_type not in families:
        raise unknown(f"model type in '{file}'", str(model_type), families)
    return families[model_type]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
