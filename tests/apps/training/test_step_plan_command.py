"""The command that compiles the artifact a run needs, and what the run is told when there is none."""

import shlex
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.training.config import parse
from apps.training.config_schema import TrainConfig
from apps.training.programs import require_artifact
from apps.training.step_plan import compile_command, plan_step
from backends.errors import UserError
from compiled.artifact import pack
from tests.apps.training.plans import SCALED, settings_of, write_config
from tests.compiled.test_artifact import manifest_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose name asks for quoting."""
    return write_config(tmp_path_factory.mktemp("models") / "my model, (tiny)")


CHOICES: dict[str, st.SearchStrategy[str]] = {
    "training.batch_size": st.sampled_from(["1", "4"]),
    "model.max_seq_length": st.sampled_from(["8", "32"]),
    "model.dtype": st.sampled_from(["float32", "bfloat16", "float64"]),
    "model.compute_dtype": st.sampled_from(["auto", "bfloat16"]),
    "model.norm_dtype": st.sampled_from(["auto", "float64"]),
    "model.residual_dtype": st.sampled_from(["auto", "float32"]),
    "model.logits_dtype": st.sampled_from(["auto", "float64"]),
    "model.article_attention": st.sampled_from(["true", "false"]),
    "optimizer.moments_dtype": st.sampled_from(["auto", "bfloat16"]),
    "optimizer.master_weights": st.sampled_from(["auto", "none"]),
    "optimizer.nesterov": st.sampled_from(["true", "false"]),
    "optimizer.groups": st.sampled_from(
        [
            "[]",
            "[{match: '*norm*', weight_decay: 0.5}]",
            "[{match: '*up_proj*', optimizer: lion, lr: 1e-4}, {match: '*.mlp.*', nesterov: true}]",
        ]
    ),
    "optimizer.lr": st.sampled_from(["0.1", "1e-5"]),
    "compile.head_chunks": st.sampled_from(["null", "1", "4"]),
    "compile.output_dir": st.text(string.ascii_letters + " ,'\"[]{}:*#$=/\\", min_size=1, max_size=8),
    "backend.default": st.sampled_from(["dense", SCALED]),
    "backend.rules": st.sampled_from(
        [
            "[]",
            f"[{{match: '*.mlp.*', use: '{SCALED}', levels: 64}}]",
            f"[{{match: '*.up_proj', use: dense}}, {{match: 'model.layers.[0]*', use: '{SCALED}'}}]",
        ]
    ),
    "training.max_steps": st.just("5"),
    "model.attention_dropout": st.sampled_from(["0", "0.1"]),
    "model.residual_dropout": st.sampled_from(["0.0", "0.25"]),
    "training.max_nonfinite_steps": st.sampled_from(["0", "15"]),
    "training.label_smoothing": st.sampled_from(["0", "0.1"]),
    "training.z_loss": st.sampled_from(["0.0", "1e-4"]),
}


@settings(max_examples=60)
@given(st.fixed_dictionaries({}, optional=CHOICES), st.booleans())
def test_the_command_compiles_exactly_what_the_run_needs(folder: Path, chosen: dict[str, str], is_path: bool) -> None:
    chosen = chosen | ({"checkpoint.model_name_or_path": str(folder)} if is_path else {})
    config = settings_of(folder, *(f"{key}={value}" for key, value in chosen.items()))
    program, script, *arguments = shlex.split(compile_command(config))
    assert (program, script) == ("python", "apps/train_llm.py")
    pasted = parse(arguments)
    assert pasted.command == "compile"
    assert pasted.compile.output_dir == config.compile.output_dir
    assert pasted.backend == config.backend
    assert plan_step(pasted).spec == plan_step(config).spec


LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126), max_size=12)


@given(st.dictionaries(st.from_regex(r"\A[a-z_]{1,6}\Z"), LEAVES | TEXTS | st.lists(TEXTS, max_size=2), max_size=3))
def test_any_option_of_a_rule_survives_the_command(options: dict[str, Any]) -> None:
    rule = {"match": "*.mlp.*", "use": "dense"} | {f"o_{name}": value for name, value in options.items()}
    config = parse(["command=run"])
    object.__setattr__(config.backend, "rules", [rule])
    assert parse(shlex.split(compile_command(config))[2:]).backend.rules == [rule]


def test_the_command_is_short_where_settings_are_defaults() -> None:
    command = compile_command(parse(["command=run", "training.max_steps=9", "optimizer.lr=1", "compile.verbose=true"]))
    assert command == "python apps/train_llm.py command=compile model.max_seq_length=256 training.batch_size=8"


def put_artifact(folder: Path, config: TrainConfig) -> Path:
    spec = plan_step(config).spec
    folder.mkdir(exist_ok=True)
    path = folder / spec.file_name
    path.write_bytes(pack(manifest_of(spec), [("regions/x", b"code")]))
    return path


def test_without_an_artifact_the_run_is_told_the_command(folder: Path, tmp_path: Path) -> None:
    config = settings_of(folder, f"compile.output_dir={tmp_path}")
    with pytest.raises(UserError) as caught:
        require_artifact(config, plan_step(config))
    assert str(caught.value) == f"There is no artifact in '{tmp_path}'. Compile one: {compile_command(config)}"


def test_the_nearest_artifacts_differences_are_shown(folder: Path, tmp_path: Path) -> None:
    place = f"compile.output_dir={tmp_path}"
    put_artifact(tmp_path, settings_of(folder, "model.dtype=float64", "training.batch_size=4", place))
    near = put_artifact(tmp_path, settings_of(folder, "training.batch_size=4", place))
    config = settings_of(folder, place)
    with pytest.raises(UserError) as caught:
        require_artifact(config, plan_step(config))
    first, heading, *rows = str(caught.value).splitlines()
    assert first.endswith(compile_command(config))
    assert near.name in first
    assert heading.split() == ["field", "|", "artifact", "|", "this", "run"]
    assert [row.split() for row in rows] == [["batch_size", "|", "4", "|", "2"]]


def test_the_artifact_that_fits_is_taken_whatever_the_learning_rate(folder: Path, tmp_path: Path) -> None:
    config = settings_of(folder, f"compile.output_dir={tmp_path}", "optimizer.lr=0.1")
    path = put_artifact(tmp_path, settings_of(folder))
    found = require_artifact(config, plan_step(config))
    assert found is not None
    assert found.path == path


def test_a_given_artifact_for_another_step_is_refused_with_the_fields(folder: Path, tmp_path: Path) -> None:
    path = put_artifact(tmp_path, settings_of(folder, "model.max_seq_length=32"))
    config = settings_of(folder, f"run.artifact={path}")
    with pytest.raises(UserError, match=r"max_seq_length +\| 32 +\| 16"):
        require_artifact(config, plan_step(config))
