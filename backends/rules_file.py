"""Rules from a file: which backend computes which layer, written down once. Imports no torch.

Three forms, told apart by what they hold, each in YAML (of which JSON is a part) or, in a file called *.toml, in TOML:

    rules: [{match: "*.mlp.*", use: optical, q_levels: 16}]     our own, as backend.rules; also the list alone
    default: dense                                              optional: a name, or {use: NAME, option: value}

    use_regex: true                                             options of the optical backend by layer name: regular
    layer_name_to_config:                                       expressions that match whole names, the first one in
      'model\\.layers\\.\\d+\\.self_attn': {q_levels: 256}           the file counts; with use_regex: false exact names;
      default: null                                             null leaves a layer alone, default is for the others

    use_lora = true                                             the optical backend for all attention products and
    [attention]                                                 for all linears but the head; use_lora and [lora]
    [fc]                                                        are settings of the trainer
    [lora]
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.errors import UserError, did_you_mean
from backends.rules_forms import RulesFile, by_name_form, global_form, own_form
from backends.yaml_reading import parse_yaml

SHIPPED = Path(__file__).parent / "configs"
_FORM_OF = {
    "rules": own_form,
    "layer_name_to_config": by_name_form,
    "attention": global_form,
    "fc": global_form,
}


def read_rules(path: str | Path) -> RulesFile:
    """Read a rules file, or the one that ships here under that name. Raises UserError naming the file and the key."""
    found = find_rules_file(path)
    name = str(path) if Path(path).is_file() else found.name
    content = _content(found, name)
    if isinstance(content, list):
        content = {"rules": content}
    if isinstance(content, Mapping):
        for key, read in _FORM_OF.items():
            if key in content:
                return read(content, name)
        held = f"the keys {', '.join(map(str, content))}" if content else "nothing"
    else:
        held = "nothing" if content is None else f"a {type(content).__name__}"
    raise UserError(
        f"Rules file {name} holds {held}. Expected a list of rules, or one of the keys {', '.join(_FORM_OF)}."
    )


def find_rules_file(path: str | Path) -> Path:
    """The file at `path`, from the current folder; for a bare name that is no file, the shipped one: optical."""
    given = Path(path)
    if given.is_file():
        return given
    shipped = sorted(SHIPPED.iterdir(), key=lambda file: (file.stem, file.suffix != ".yaml"))
    for file in shipped:
        if str(path) in (file.name, file.stem):
            return file
    what = "it is a folder" if given.is_dir() else "there is no such file"
    names = dict.fromkeys([*(file.stem for file in shipped), *(file.name for file in shipped)])
    raise UserError(
        f"Cannot read rules file {path}: {what}.{did_you_mean(str(path), names)} "
        f"These ship here: {', '.join(file.name for file in shipped)}."
    )


def _content(path: Path, name: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read rules file {name}: {error.strerror}. Expected YAML or TOML.") from None
    except UnicodeDecodeError:
        raise UserError(f"Cannot read rules file {name}: it is not UTF-8 text. Expected YAML or TOML.") from None
    if path.suffix.lower() != ".toml":
        return parse_yaml(text, f"rules file {name}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"Cannot read rules file {name}: {error}. Expected TOML.") from None
