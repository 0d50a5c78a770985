"""Settings reach the program typed, and survive the trip through YAML."""

import dataclasses
import json
import string
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training.config import parse, parse_dataclass, to_mapping, to_yaml
from apps.training.config_keys import Key, keys_of
from apps.training.config_schema import TrainConfig, setting

RULES = [{"match": "*.mlp.*", "use": "dense"}]


def from_file(text: str, *more: str) -> TrainConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return parse([f"config={path}", *more])


def test_a_command_alone_gives_the_defaults() -> None:
    config = parse(["command=run"])
    assert config.command == "run"
    assert config.training.batch_size == 8
    assert config.training.dataset is None
    assert config.optimizer.settings.lr == 1e-3
    assert config.extra == {}


def test_values_arrive_in_their_types() -> None:
    config = parse(
        "command=compile training.batch_size=4 training.evaluate=off optimizer.lr=1e-2 training.max_grad_norm=null "
        "model.dtype=bfloat16 compile.head_chunks=3 run.cuda_graph=on training.output_dir=a=b".split()
    )
    assert config.training.batch_size == 4
    assert config.training.evaluate is False
    assert config.optimizer.settings.lr == 0.01
    assert config.training.max_grad_norm is None
    assert config.model.dtype == "bfloat16"
    assert config.compile.head_chunks == 3
    assert config.run.cuda_graph == "on"
    assert config.training.output_dir == "a=b"


def test_text_stays_as_typed() -> None:
    for text in ("1e-4", "true", "a: b", "'quoted'", "${HOME}", "[1", "ünï", "=", "#x"):
        assert parse(["command=run", f"logging.sample_prompt={text}"]).logging.sample_prompt == text


def test_rules_are_a_list_as_a_shell_hands_it_over() -> None:
    assert parse(["command=run", 'backend.rules=[{match: "*.mlp.*", use: dense}]']).backend.rules == RULES
    rule = parse(["command=run", "backend.rules=[{match: 'a', use: dense, noise: 1e-3, bits: 8}]"]).backend.rules[0]
    assert (rule["noise"], rule["bits"]) == (0.001, 8)


def test_shorthand_names_the_plugin() -> None:
    config = parse(["command=run", "optimizer=adamw", "schedule=linear", "schedule.warmup_steps=5"])
    assert config.optimizer.name == "adamw"
    assert config.schedule.settings.warmup_steps == 5


def test_plus_adds_a_key_the_schema_lacks() -> None:
    config = parse(["command=run", "+new.key=1e-4", "+new.other=[a, b]", "+model.own=text"])
    assert config.extra == {"new": {"key": 1e-4, "other": ["a", "b"]}, "model": {"own": "text"}}


def test_what_plus_adds_is_as_a_checkpoint_gives_it_back() -> None:
    """YAML reads dates and names that are numbers, JSON has neither: a run could save no checkpoint."""
    config = parse(["command=run", "+run.started=2026-11-30", "+run.at=[2026-11-30 10:00:00]", "+run.of={1: a}"])
    assert config.extra == {"run": {"started": "2026-11-30", "at": ["2026-11-30T10:00:00"], "of": {"1": "a"}}}
    assert from_file("command: run\nextra: {run: {started: 2026-11-30}}\n").extra == {"run": {"started": "2026-11-30"}}
    assert parse(["command=run"], base=to_mapping(config)).extra == config.extra


@pytest.mark.parametrize("day", ["2024-12-05", "2024-12-05 10:00:00"])
def test_a_date_where_a_text_is_expected_is_its_text(day: str) -> None:
    """YAML reads it as a date, in a list on the command line and anywhere in a file."""
    text = day.replace(" ", "T")
    config = parse(["command=run", f"logging.tags=[{day}, b]"])
    assert config.logging.tags == [text, "b"]
    assert from_file(to_yaml(config)) == config
    read = from_file(f"command: run\nlogging: {{tags: [{day}], name: {day}}}\n")
    assert (read.logging.tags, read.logging.name) == ([text], text)


def test_plus_before_a_known_key_sets_that_key() -> None:
    assert parse(["command=run", "+compile.debug=True"]).compile.debug is True


def test_the_command_line_overrides_the_file() -> None:
    text = "command: compile\ntraining: {batch_size: 2, seed: 7}\noptimizer: adamw\nextra: {mine: {a: 1, b: 2}}\n"
    config = from_file(text, "training.seed=8", "+mine.a=3")
    assert (config.command, config.training.batch_size, config.training.seed) == ("compile", 2, 8)
    assert config.extra == {"mine": {"a": 3, "b": 2}}


def test_a_hand_written_file_may_say_on_and_1e_4() -> None:
    config = from_file("command: run\nrun: {cuda_graph: on}\noptimizer:\n  lr: 1e-4\nmodel:\n")
    assert config.run.cuda_graph == "on"
    assert config.optimizer.settings.lr == 1e-4


def test_precision_follows_the_parameters() -> None:
    precision = parse(["command=run", "model.dtype=bfloat16"]).precision
    assert (precision.compute, precision.norms, precision.master) == ("bfloat16", "float32", "float32")


def texts() -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
        lambda text: text != "null"
    )


def words() -> st.SearchStrategy[str]:
    return st.text(string.ascii_letters, min_size=1, max_size=4)


def values_of(key: Key) -> st.SearchStrategy[Any]:
    """Any value a key takes, as a person would spell it on the command line."""
    if key.path in ("optimizer.name", "schedule.name", "backend.default"):
        return st.just(key.default)
    if key.path == "logging.report_to":
        return st.sampled_from(["[]", "[csv]"])  # what is always installed
    if key.path == "backend.rules_file":
        return st.sampled_from(["optical", "optical-mlp-only.yaml", "optical.toml", "null"])
    if key.path == "checkpoint.save_steps":
        return st.one_of(st.integers(1, 10**12), st.lists(st.integers(1, 10**12), min_size=1)).map(json.dumps)
    if key.path == "optimizer.groups":
        group = {"match": words(), "optimizer": st.sampled_from(["adamw", "sgdm"]), "lr": st.floats(1e-12, 1)}
        return st.lists(st.fixed_dictionaries(group)).map(json.dumps)
    if key.choices:
        values: st.SearchStrategy[Any] = st.sampled_from(key.choices)
    elif key.plain_type is bool:
        values = st.sampled_from(["true", "false"])
    elif key.plain_type is int:
        low = int(key.at_least if key.at_least is not None else 0)
        values = st.integers(low, 10**12)
    elif key.plain_type is float:
        values = st.floats(1e-12, 0.999)  # inside every plugin's own ranges
    elif key.plain_type is str:
        values = texts()
    elif key.plain_type == list[str]:
        values = st.lists(words(), min_size=1).map(json.dumps)
    else:
        rule = {"match": words(), "use": st.just("dense"), "bits": st.integers(), "noise": st.floats(0, 1)}
        values = st.lists(st.fixed_dictionaries(rule)).map(json.dumps)  # JSON is YAML
    return st.one_of(values, st.just("null")) if key.optional else values


@st.composite
def argument_lists(draw: st.DrawFn) -> list[str]:
    keys = keys_of(TrainConfig)
    # not possible beside some other values; the token budget has a test of its own below
    clashing = {"checkpoint.config_name", "optimizer.master_weights", "training.token_budget"}
    chosen = draw(st.lists(st.sampled_from([path for path in keys if path not in clashing]), unique=True))
    arguments = [f"{path}={draw(values_of(keys[path]))}" for path in chosen if path != "command"]
    added = draw(st.dictionaries(words(), st.one_of(words(), st.integers(), st.lists(words())), max_size=2))
    arguments += [f"+zz.{name}={json.dumps(value)}" for name, value in added.items()]
    return [f"command={draw(st.sampled_from(['compile', 'run']))}", *arguments]


@given(argument_lists())
def test_any_config_survives_the_trip_through_yaml(arguments: list[str]) -> None:
    config = parse(arguments)
    assert from_file(to_yaml(config)) == config


@given(st.sampled_from(["1e9", "22*N/100", "2*(N + N_non_embedding)", "N**2/10"]), st.integers(1, 10**6))
def test_a_token_budget_survives_the_trip_through_yaml(budget: str, epochs: int) -> None:
    config = parse(["command=run", f"training.token_budget={budget}", f"training.num_epochs={epochs}"])
    assert config.training.token_budget == budget
    assert from_file(to_yaml(config)) == config


def test_rules_survive_the_trip_through_yaml() -> None:
    config = parse(["command=run", 'backend.rules=[{match: "*.mlp.*", use: dense}]'])
    assert from_file(to_yaml(config)).backend.rules == RULES


def test_the_yaml_is_flat_within_a_section() -> None:
    mapping = to_mapping(parse(["command=run", "optimizer.lr=1"]))
    assert mapping["optimizer"]["name"] == "adamw"
    assert mapping["optimizer"]["lr"] == 1.0
    assert "settings" not in mapping["optimizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """Copy files."""

    source: str = setting(help="folder to read")
    limit: int | None = setting(None, "stop after so many", at_least=1)
    ratio: float = 0.5
    names: list[str] = setting(factory=list)


def test_a_small_app_has_the_same_front_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_dataclass(Small, ["source=a", "limit=3"]) == Small(source="a", limit=3)
    assert parse_dataclass(Small, ["source=a", "names=[x, y]"]).names == ["x", "y"]
    with pytest.raises(SystemExit) as stop:
        parse_dataclass(Small, ["--help"], program="small")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: small source=…" in shown
    assert "limit: int = null" in shown
    assert "stop after so many" in shown
