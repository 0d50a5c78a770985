"""A mistake on the command line is one line: what was given, what was expected, what to type instead."""

import dataclasses
import re
from pathlib import Path

import pytest

from apps.training.config import parse, parse_dataclass
from apps.training.config_keys import KNOWN_ELSEWHERE, keys_of, sections_of
from apps.training.config_schema import TrainConfig, setting
from backends.errors import UserError


def message(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(["command=run", *arguments])
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("learning_rate=1", "optimizer.lr"),
        ("training.learning_rate=1", "optimizer.lr"),
        ("lr=1", "optimizer.lr"),
        ("optimiser.lr=1", "optimizer.lr"),
        ("trainng.batch_size=4", "training.batch_size"),
        ("batch_size=4", "training.batch_size"),
        ("training.bach_size=4", "training.batch_size"),
        ("model.sequence_length=4", "model.max_seq_length"),
        ("training.end_early_at_step=4", "training.max_steps"),
        ("samba_compile.debug=true", "compile.debug"),
        ("samba_compile.output_folder=x", "compile.output_dir"),
        ("samba_run.pef=x", "run.artifact"),
        ("optim=adamw", "optimizer"),
    ],
)
def test_an_unknown_key_names_the_nearest_full_path(given: str, meant: str) -> None:
    text = message(given)
    assert text.startswith(f"Unknown setting '{given.partition('=')[0]}'.")
    assert f"Did you mean '{meant}'?" in text


def test_names_known_elsewhere_point_at_keys_that_exist() -> None:
    keys = keys_of(TrainConfig)
    assert [name for name in KNOWN_ELSEWHERE.values() if name not in keys and name not in sections_of(keys)] == []


def test_an_unknown_key_without_a_neighbour_lists_its_section() -> None:
    assert "Section 'logging' has: logging.every, logging.progress" in message("logging.zzz=1")
    assert "Sections: model, checkpoint, training" in message("zzz.qqq=1")


def test_a_section_is_not_a_key() -> None:
    assert message("training=4").startswith("'training' is a section. Expected one of its keys: training.dataset")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("training.batch_size=abc", "int, at least 1"),
        ("training.batch_size=0", "int, at least 1"),
        ("training.batch_size=2.5", "int, at least 1"),
        ("training.batch_size=true", "int, at least 1"),
        ("training.batch_size=null", "int, at least 1"),
        ("training.batch_size=${x}", "int, at least 1"),
        ("training.max_steps=none", "int, at least 1 or null"),
        ("training.seed=1e3", "int, at least 0"),
        ("training.evaluate=maybe", "bool"),
        ("training.output_dir=null", "str"),
        ("training.max_grad_norm=inf", "float, above 0 or null"),
        ("model.dtype=bf16", "float32|bfloat16|float64. Did you mean 'bfloat16'?"),
        ("compile.arch=gpu", "auto|cpu|cuda"),
        ("run.cuda_graph=true", "auto|on|off"),
        ("backend.rules=3", "list"),
        ("backend.rules=[3]", "list"),
    ],
)
def test_a_wrong_value_shows_what_was_given_and_expected(given: str, expected: str) -> None:
    assert message(given).startswith(f"Wrong value {given}. Expected {expected}")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("training.seed", "int, at least 0, at most 18446744073709551615"),
        ("training.max_steps", "int, at least 1 or null"),
        ("optimizer.lr", "float, above 0"),
    ],
)
def test_a_number_that_no_machine_counts_to_is_a_wrong_value(key: str, expected: str) -> None:
    """A seed above 64 bits trained to the end, and then failed in the report's sample."""
    for number in (2**64, 10**400) if key == "training.seed" else (10**400,):
        assert message(f"{key}={number}") == f"Wrong value {key}={number}. Expected {expected}."
    assert parse(["command=run", f"training.seed={2**64 - 1}"]).training.seed == 2**64 - 1


@pytest.mark.parametrize("given", ["optimizer.lr=0", "optimizer.lr=-1", "optimizer.lr=nan", "optimizer.beta1=1"])
def test_a_plugin_checks_its_own_ranges(given: str) -> None:
    assert given.partition("=")[0] in message(given)


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert message("optimizer=adamww").startswith(
        "Unknown optimizer 'adamww'. Did you mean 'adamw'? Available: adafactor,"
    )
    assert "Did you mean 'linear'?" in message("schedule=lineal")
    assert "Did you mean 'dense'?" in message("backend.default=dens")
    assert "Did you mean 'dense'?" in message("backend.rules=[{match: '*', use: denze}]")


def test_a_backend_from_outside_is_not_looked_up_here() -> None:
    assert parse(["command=run", "backend.default=mine.optics:Lens"]).backend.default == "mine.optics:Lens"


def test_a_rule_needs_a_pattern_and_a_backend() -> None:
    assert "backend.rules[0]" in message("backend.rules=[{match: '*'}]")


def test_an_unquoted_star_says_so() -> None:
    assert "has to be quoted: '*.mlp.*'" in message("backend.rules=[{match: *.mlp.*, use: dense}]")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("foo", "foo=VALUE"), ("--training.seed=8", "training.seed=8"), ("compile", "command=compile"), ("", "=VALUE")],
)
def test_what_is_no_assignment_is_shown_as_one(given: str, meant: str) -> None:
    assert f"Cannot read '{given}'. Expected key=value. Did you mean '{meant}'?" in message(given)


def test_an_empty_value_is_a_mistake() -> None:
    for given in ("training.output_dir=", "training.max_steps=", "backend.rules=", "command=", "+new.key="):
        with pytest.raises(UserError, match=rf"'{re.escape(given)}' has no value. Expected "):
            parse([given])


@pytest.mark.parametrize("value", ["!!binary aGk=", "!!set {a}", "{2026-11-30: 1}", "&a [*a]"])
def test_an_added_value_that_json_lacks_is_a_mistake(value: str) -> None:
    assert "'new.key' holds what JSON, and so a checkpoint, cannot: " in message(f"+new.key={value}")


def test_a_key_given_twice_is_a_mistake() -> None:
    assert "'training.seed' is given twice: 1 and 2." in message("training.seed=1", "training.seed=2")
    assert "'optimizer.name' is given twice" in message("optimizer=adamw", "optimizer.name=adamw")


def test_the_command_is_needed_and_known() -> None:
    with pytest.raises(UserError, match="command=compile or command=run"):
        parse([])
    with pytest.raises(UserError, match="Did you mean 'compile'"):
        parse(["command=compil"])


def test_both_sources_of_a_model_are_one_too_many() -> None:
    text = message("checkpoint.config_name=demo", "checkpoint.model_name_or_path=folder")
    assert text.startswith(
        "Please specify exactly one of checkpoint.config_name or checkpoint.model_name_or_path; got "
        "checkpoint.config_name=demo and checkpoint.model_name_or_path=folder"
    )


def test_dtypes_that_do_not_go_together_are_refused() -> None:
    assert "Master weights" in message("model.dtype=float64", "optimizer.master_weights=float32")


@pytest.mark.parametrize("given", ["+a..b=1", "+=1", "+.a=1"])
def test_an_added_key_needs_a_name_between_its_dots(given: str) -> None:
    assert "Expected +section.key=value" in message(given)


def test_an_added_key_cannot_be_value_and_section_at_once() -> None:
    assert "'a' has a value already" in message("+a=1", "+a.b=2")
    assert "'a' is a section already" in message("+a.b=1", "+a=2")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "training: {bach_size: 4}",
            "Unknown setting 'training.bach_size' in FILE. Did you mean 'training.batch_size'?",
        ),
        ("training: {batch_size: four}", 'Wrong value training.batch_size="four" in FILE. Expected int, at least 1.'),
        ("training: {batch_size: [1]}", "Wrong value training.batch_size=[1] in FILE. Expected int, at least 1."),
        ("training: 3", "'training' is a section in FILE."),
        ("trainin: {seed: 3}", "Unknown setting 'trainin' in FILE. Did you mean 'training'?"),
        ("training: {seed: 1, seed: 2}", "key 'seed' is given twice"),
        ("training: {seed: 1", "Cannot read FILE at line 1"),
        ("- a\n- b", "Cannot use config=FILE: expected a mapping of sections, got list."),
        ("", "Cannot use config=FILE: expected a mapping of sections, got NoneType."),
        ("a: \x00", "Cannot read FILE"),
        ("!!python/object:os.system {}", "Cannot read FILE"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    assert expected.replace("FILE", str(path)) in message(f"config={path}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "No such file" in message(f"config={tmp_path}/none.yaml")
    assert "Is a directory" in message(f"config={tmp_path}")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in message(f"config={tmp_path}/binary.yaml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    prompt: str = setting(allow_empty=True)
    top_k: int | None = None
    top_p: float = setting(1.0, above=0, at_most=1)


def test_a_small_app_has_the_same_errors() -> None:
    with pytest.raises(UserError, match=r"prompt is missing \(str\). Expected prompt="):
        parse_dataclass(Small, [])
    with pytest.raises(UserError, match="Unknown setting 'topk'. Did you mean 'top_k'?"):
        parse_dataclass(Small, ["prompt=a", "topk=3"])
    with pytest.raises(UserError, match=r"Unknown setting 'own'. Settings: prompt, top_k, top_p. See --help"):
        parse_dataclass(Small, ["prompt=a", "+own=3"])
    with pytest.raises(UserError, match="Wrong value top_p=1.5. Expected float, above 0, at most 1."):
        parse_dataclass(Small, ["prompt=a", "top_p=1.5"])


def test_a_text_may_be_empty_where_that_means_something() -> None:
    assert parse_dataclass(Small, ["prompt="]).prompt == ""
