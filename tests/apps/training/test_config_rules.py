"""A rules file in the settings: it is read once, and what it says is what is stored."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apps.training.config import parse, parse_dataclass, to_mapping, to_yaml
from apps.training.config_rules import without_origins
from apps.training.config_schema import BackendConfig, setting
from backends.errors import UserError

MLP = {"match": "*.mlp.*", "use": "dense", "origin": "rules.yaml"}
OWN = {"match": "lm_head", "use": "dense"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rules.yaml").write_text("- {match: '*.mlp.*', use: dense}\n")
    Path("with_default.yaml").write_text("rules: []\ndefault: {use: 'a.b:C', levels: 4}\n")


def backend(*arguments: str) -> BackendConfig:
    return parse(["command=run", *arguments]).backend


def test_a_rules_file_becomes_the_rules_and_is_forgotten() -> None:
    chosen = backend("backend.rules_file=rules.yaml")
    assert (chosen.rules, chosen.default, chosen.rules_file) == ([MLP], "dense", None)


def test_its_default_with_options_becomes_the_default() -> None:
    chosen = backend("backend.rules_file=with_default.yaml")
    assert chosen.default == {"use": "a.b:C", "levels": 4, "origin": "with_default.yaml"}
    assert chosen.rules == []


def test_the_stored_settings_need_no_file() -> None:
    config = parse(["command=run", "backend.rules_file=rules.yaml"])
    Path("config.yaml").write_text(to_yaml(config))
    Path("rules.yaml").unlink()
    assert parse(["config=config.yaml"]) == config


def test_the_stored_settings_of_a_shipped_file_survive_yaml_and_json() -> None:
    config = parse(["command=run", "backend.rules_file=optical"])
    Path("config.yaml").write_text(to_yaml(config))
    assert parse(["config=config.yaml"]) == config
    assert parse([], base=json.loads(json.dumps(to_mapping(config)))) == config
    assert config.backend.rules[0]["match"] == r"model\.layers\.[0-9]+\.self_attn"


@pytest.mark.parametrize("order", [1, -1])
def test_rules_of_the_command_line_come_first_and_its_default_wins(order: int) -> None:
    given = [f"backend.rules={json.dumps([OWN])}", "backend.default=dense", "backend.rules_file=with_default.yaml"]
    chosen = backend(*given[::order])
    assert (chosen.rules, chosen.default) == ([OWN], "dense")
    assert backend("backend.rules_file=rules.yaml", given[0]).rules == [OWN, MLP]


def test_a_rules_file_on_the_command_line_replaces_the_rules_of_a_settings_file() -> None:
    Path("c.yaml").write_text("command: run\nbackend: {rules: [{match: a, use: dense}], default: 'a.b:C'}\n")
    chosen = parse(["config=c.yaml", "backend.rules_file=rules.yaml"]).backend
    assert (chosen.rules, chosen.default) == ([MLP], "a.b:C")


def test_rules_on_the_command_line_come_before_the_rules_file_of_a_settings_file() -> None:
    Path("c.yaml").write_text("command: run\nbackend: {rules: [{match: a, use: dense}], rules_file: rules.yaml}\n")
    own = {"match": "a", "use": "dense"}
    assert parse(["config=c.yaml"]).backend.rules == [own, MLP]
    assert parse(["config=c.yaml", f"backend.rules={json.dumps([OWN])}"]).backend.rules == [OWN, MLP]
    assert parse(["config=c.yaml", "backend.rules_file=null"]).backend.rules == [own]


def test_the_files_origin_decides_nothing() -> None:
    Path("sub").mkdir()
    Path("sub/other.yaml").write_text(Path("rules.yaml").read_text())
    Path("sub/default.yaml").write_text(Path("with_default.yaml").read_text())
    one = [parse(["command=run", f"backend.rules_file={name}"]) for name in ("rules.yaml", "sub/other.yaml")]
    two = [parse(["command=run", f"backend.rules_file={name}"]) for name in ("with_default.yaml", "sub/default.yaml")]
    for pair in (one, two):
        settings = [to_mapping(config) for config in pair]
        assert settings[0] != settings[1]
        assert without_origins(settings[0]) == without_origins(settings[1])


# ---- LoRA ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    r: int = setting(0, "rank")
    alpha: float = setting(8.0, "scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithLora:
    """Settings of a program that has LoRA."""

    backend: BackendConfig = dataclasses.field(default_factory=BackendConfig)
    lora: Lora = dataclasses.field(default_factory=Lora)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithoutLora:
    """Settings of a program that has none."""

    backend: BackendConfig = dataclasses.field(default_factory=BackendConfig)


@pytest.mark.parametrize(
    ("content", "arguments", "lora"),
    [
        ("use_lora = true\n[fc]\n[lora]\nr = 32\nlora_alpha = 16\n", [], Lora(r=32, alpha=16.0)),
        ("use_lora = true\n[fc]\n[lora]\nr = 32\n", [], Lora(r=32)),
        ("use_lora = true\n[fc]\n[lora]\nr = 32\nlora_alpha = 16\n", ["lora.r=4"], Lora(r=4, alpha=16.0)),
        ("use_lora = true\n[fc]\n[lora]\nr = 32\nlora_alpha = 16\n", ["lora.alpha=1"], Lora(r=32, alpha=1.0)),
        ("use_lora = false\n[fc]\n[lora]\nr = 32\nlora_alpha = 16\n", [], Lora()),
        ("[fc]\n", ["lora.r=4"], Lora(r=4)),
    ],
)
def test_the_files_lora_part_sets_the_trainers_settings(content: str, arguments: list[str], lora: Lora) -> None:
    Path("rules.toml").write_text(content)
    assert parse_dataclass(WithLora, [*arguments, "backend.rules_file=rules.toml"]).lora == lora


def test_a_program_without_lora_says_so() -> None:
    Path("rules.toml").write_text("use_lora = true\n[fc]\n[lora]\nr = 32\n")
    with pytest.raises(UserError, match="Rules file rules.toml has use_lora = true, which this program has no"):
        parse_dataclass(WithoutLora, ["backend.rules_file=rules.toml"])
    Path("rules.toml").write_text("use_lora = false\n[fc]\n[lora]\nr = 32\n")
    assert len(parse_dataclass(WithoutLora, ["backend.rules_file=rules.toml"]).backend.rules) == 1


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["backend.rules_file=none.yaml"], "Cannot read rules file none.yaml: there is no such file."),
        (["backend.rules_file="], "'backend.rules_file=' has no value."),
        (["backend.rules=3", "backend.rules_file=rules.yaml"], "Wrong value backend.rules=3. Expected list."),
        (["backend.rules=[3]", "backend.rules_file=rules.yaml"], "Wrong value backend.rules=[3]. Expected list."),
        (["backend.rules=[{match: a, use: dense, only: b}]"], "backend.rules[0]: Routing rule 'a' has only='b'."),
        (["backend.rules=[{match: '(', use: dense, syntax: regex}]"], "backend.rules[0]: Routing rule '(' is no reg"),
        (["backend.default={}"], "backend.default: The default backend is {}. Expected a backend's name or {use: "),
        (["backend.default={use: dens}"], "Unknown backend 'dens'. Did you mean 'dense'?"),
        (["backend.default=[dense]"], "Wrong value backend.default=[dense]. Expected str or dict."),
        (["backend.default=null"], "Wrong value backend.default=null. Expected str or dict."),
    ],
)
def test_a_mistake_is_one_line(given: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(["command=run", *given])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["3", "''", "[rules.yaml]", "true"])
def test_a_settings_file_has_no_name_of_a_file(name: str) -> None:
    Path("c.yaml").write_text(f"command: run\nbackend: {{rules_file: {name}}}\n")
    with pytest.raises(UserError, match=r"^Wrong value backend.rules_file=.* in c.yaml. Expected str or null.$"):
        parse(["config=c.yaml"])


def test_a_program_without_the_setting_does_not_know_it() -> None:
    with pytest.raises(UserError, match="Unknown setting 'backend.rules_file'"):
        parse_dataclass(Lora, ["backend.rules_file=rules.yaml"])


def test_reading_a_rules_file_needs_no_torch() -> None:
    code = (
        "import sys; from apps.training.config import parse\n"
        "assert parse(['command=run', 'backend.rules_file=optical']).backend.rules\n"
        "assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
