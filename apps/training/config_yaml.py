"""YAML files of settings in, and out again."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from backends.errors import UserError
from backends.yaml_reading import EXPONENT, FLOAT, parse_yaml


def read_yaml_mapping(path: str) -> dict[str, Any]:
    """The mapping in the file at `path`; UserError when there is none."""
    try:
        value = parse_yaml(Path(path).read_text(encoding="utf-8"), path)
    except OSError as error:
        raise UserError(f"Cannot read config={path}: {error.strerror}. Expected a YAML file of settings.") from None
    except UnicodeDecodeError:
        raise UserError(f"Cannot read config={path}: it is not UTF-8 text. Expected a YAML file of settings.") from None
    if not isinstance(value, dict):
        raise UserError(f"Cannot use config={path}: expected a mapping of sections, got {type(value).__name__}.")
    return value


def write_yaml(value: dict[str, Any]) -> str:
    """`value` as YAML, in its own order and in ASCII: PyYAML reads some of the line breaks it writes back as blanks."""
    import yaml

    return yaml.dump(value, Dumper=_dumper(), sort_keys=False, width=120)


@cache
def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:  # equal lists are written out, not as &id001 and *id001
            return True

    Dumper.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))  # what only looks like a number is quoted
    return Dumper


def written(value: Any) -> str:
    """A setting as the command line takes it: a text is itself, anything else YAML, of which JSON is a part."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
