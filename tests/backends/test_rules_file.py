"""Files of rules: found, read and refused. What each form means is in test_rules_forms.py."""

import tomllib
from pathlib import Path

import pytest
import yaml

import backends
from backends.errors import UserError
from backends.rules_file import SHIPPED, find_rules_file, read_rules

OWN = "- {match: '*.mlp.*', use: dense}\n"
NAMES = sorted(file.name for file in SHIPPED.iterdir())


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(name: str, content: str | bytes | None = None) -> str:
    if content is not None:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        read_rules(name)
    message = str(caught.value)
    assert "\n" not in message
    assert f"ules file {name}" in message
    return message


# ---- where a file is found -------------------------------------------------------------------------------------


def test_a_relative_name_is_of_the_current_folder() -> None:
    Path("my.yaml").write_text(OWN)
    assert read_rules("my.yaml").rules == ({"match": "*.mlp.*", "use": "dense", "origin": "my.yaml"},)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_file_is_found_by_its_name(name: str) -> None:
    assert find_rules_file(name) == SHIPPED / name
    assert read_rules(name).name == name


def test_a_name_without_an_ending_is_the_yaml_file() -> None:
    assert find_rules_file("optical") == SHIPPED / "optical.yaml"
    assert find_rules_file("optical-4bit") == SHIPPED / "optical-4bit.yaml"


def test_a_file_of_ones_own_comes_before_the_shipped_one() -> None:
    Path("optical.yaml").write_text(OWN)
    assert read_rules("optical.yaml").rules[0]["match"] == "*.mlp.*"
    assert find_rules_file("optical") == SHIPPED / "optical.yaml"
    Path("optical").mkdir()
    assert find_rules_file("optical") == SHIPPED / "optical.yaml"


def test_a_path_with_folders_is_never_a_shipped_one() -> None:
    assert "there is no such file" in refused("./optical.yaml")


# ---- what ships ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_shipped_file_says_what_it_is_and_names_options_that_exist(name: str) -> None:
    text = (SHIPPED / name).read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"backend.rules_file={name}" in text or f"backend.rules_file={name.removesuffix('.yaml')}\n" in text
    file = read_rules(name)
    for rule in (*file.rules, *([file.default] if isinstance(file.default, dict) else [])):
        options = {key: value for key, value in rule.items() if key not in ("match", "use", "syntax", "only", "origin")}
        assert backends.load(rule["use"], **options).name in ("optical", "fp8", "dense")


def test_the_shipped_yaml_and_toml_hold_the_same_options_as_the_backends_defaults() -> None:
    defaults = backends.load("optical").options()
    by_name = yaml.safe_load((SHIPPED / "optical.yaml").read_text())["layer_name_to_config"]
    sections = tomllib.loads((SHIPPED / "optical.toml").read_text())
    for options in (*filter(None, by_name.values()), sections["attention"], sections["fc"]):
        assert options == {key: defaults[key] for key in options}


# ---- what is refused -------------------------------------------------------------------------------------------


def test_a_name_that_is_nearly_a_shipped_one() -> None:
    message = refused("optcal")
    assert message.startswith("Cannot read rules file optcal: there is no such file. Did you mean 'optical'? ")
    assert all(name in message for name in NAMES)


def test_a_folder() -> None:
    Path("folder").mkdir()
    assert "it is a folder" in refused("folder")


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    Path("secret.yaml").write_text(OWN)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert refused("secret.yaml") == "Cannot read rules file secret.yaml: Permission denied. Expected YAML or TOML."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.yaml", b"\xff\xfe\x00", "it is not UTF-8 text"),
        ("x.yaml", "- {match: *.mlp.*, use: dense}", "has to be quoted: '*.mlp.*'"),
        ("x.yaml", "a: 1\na: 2\n", "line 2, column 1: key 'a' is given twice"),
        ("x.toml", "use_lora = flase\n", "Invalid value (at line 1, column 12). Expected TOML."),
        ("x.toml", OWN, "Expected TOML"),
        ("x.yaml", "", "holds nothing. Expected a list of rules, or one of the keys rules, layer_name_to_config, "),
        ("x.toml", "", "holds nothing. Expected a list of rules, or one of the keys rules, layer_name_to_config, "),
        ("x.yaml", "optical", "holds a str. Expected a list"),
        ("x.yaml", "model: {dtype: float32}\n", "holds the keys model. Expected a list"),
        ("x.toml", "use_lora = true\n[lora]\nr = 4\n", "holds the keys use_lora, lora. Expected a list"),
    ],
)
def test_what_is_of_no_form(name: str, content: str | bytes, message: str) -> None:
    assert message in refused(name, content)
