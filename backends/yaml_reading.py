"""YAML as people write settings: `1e-4` is a number, a key given twice is a mistake, errors fit on one line."""

import re
from functools import cache
from typing import Any

from backends.errors import UserError

FLOAT = "tag:yaml.org,2002:float"
# YAML 1.1 takes 1e-4 for a text because it has no dot; people who write learning rates do not.
EXPONENT = re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")


@cache
def _loader() -> Any:
    import yaml  # where it is needed: --help reads none, and has to be quick

    class Loader(yaml.SafeLoader):
        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (ValueError, KeyError, AttributeError) as error:  # 2024-13-45 looks like a date and is none
                kind, given = node.tag.rpartition(":")[2], str(node.value)[:40]
                problem = f"'{given}' is no {kind} ({error}); a text that looks like one has to be quoted"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    problem = f"key '{key.value}' is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))
    return Loader


def parse_yaml(text: str, origin: str) -> Any:
    """The value that `text` spells; UserError naming `origin` and the place when it is not YAML."""
    import yaml

    try:
        return yaml.load(text, _loader())  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        hint = " A pattern that starts with * has to be quoted: '*.mlp.*'." if "alias" in str(error) else ""
        raise UserError(f"Cannot read {origin}{where}: {problem}. Expected YAML.{hint}") from None
