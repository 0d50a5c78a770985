"""With which settings a run goes on, and when it is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apps.training.checkpointing.resume import (
    goes_on_in_place,
    require_same_run,
    resumed_settings,
    save_folder,
)
from apps.training.config import parse, to_mapping
from apps.training.config_schema import TrainConfig
from apps.training.steps import accumulation_steps
from backends.errors import UserError
from tests.apps.training.checkpointing.toys import save

FIRST = [
    "command=run",
    "checkpoint.config_name=demo",
    "checkpoint.save=true",
    "checkpoint.num_steps=5",
    "training.max_steps=20",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=4",
    "optimizer.lr=0.003",
    "schedule.warmup_steps=3",
    "logging.every=7",
    "training.overwrite_output_dir=true",
    "+mine.note=hello",
]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[list[str], Path]:
    """The command line of a run, and its checkpoints of steps 5 and 10, where it looks for them itself."""
    argv = [*FIRST, f"training.output_dir={tmp_path}/out"]
    folder = tmp_path / "out" / "checkpoints"
    state = {"settings": to_mapping(parse(argv)), "run": {"global_batch_size": 8, "seed": 42}}
    save(folder, 5, 10, state=state)
    return argv, folder


def resumed(*argv: str) -> tuple[TrainConfig, Path | None]:
    return resumed_settings(argv, parse(argv))


def test_the_same_command_line_goes_on_by_itself(saved: tuple[list[str], Path]) -> None:
    argv, folder = saved
    config, path = resumed(*argv, "training.resume=auto")
    assert path == folder / "iter_10"
    assert config.optimizer.settings.lr == 0.003
    assert config.checkpoint.num_steps == 5


@pytest.fixture
def saved_with_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of a run with a rules file and an options-bearing default, and its checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("rules.yaml").write_text("rules: [{match: '*.mlp.*', use: 'a.b:C', levels: 8}]\ndefault: {use: 'a.b:C'}\n")
    argv = [*FIRST, f"training.output_dir={tmp_path}/out", "backend.rules_file=rules.yaml"]
    state = {"settings": to_mapping(parse(argv)), "run": {"global_batch_size": 8, "seed": 42}}
    save(tmp_path / "out" / "checkpoints", 5, state=state)
    return [*argv, "training.resume=auto"]


def test_a_rules_file_may_be_given_again_moved_and_forgotten(saved_with_rules: list[str], tmp_path: Path) -> None:
    config, path = resumed(*saved_with_rules)
    assert path is not None
    assert config.backend == parse(saved_with_rules).backend
    Path("rules.yaml").rename("moved.yaml")
    moved, path = resumed(*saved_with_rules[:-2], "backend.rules_file=moved.yaml", "training.resume=auto")
    assert path is not None
    assert [rule["levels"] for rule in moved.backend.rules] == [8]
    forgotten, path = resumed("command=run", f"training.output_dir={tmp_path}/out", "training.resume=auto")
    assert path is not None
    assert forgotten.backend == config.backend


@pytest.mark.parametrize(
    ("before", "after", "setting"),
    [("levels: 8", "levels: 4", "backend.rules"), ("{use: 'a.b:C'}", "{use: 'a.b:D'}", "backend.default.use")],
)
def test_a_rules_file_that_was_changed_is_refused(
    saved_with_rules: list[str], before: str, after: str, setting: str
) -> None:
    Path("rules.yaml").write_text(Path("rules.yaml").read_text().replace(before, after))
    with pytest.raises(UserError) as caught:
        resumed(*saved_with_rules)
    _, _, line = str(caught.value).splitlines()
    assert line.split("|")[0].strip() == setting


def test_without_a_checkpoint_resume_auto_starts(tmp_path: Path) -> None:
    argv = [*FIRST, f"training.output_dir={tmp_path}/new", "training.resume=auto"]
    assert resumed(*argv) == (parse(argv), None)
    with pytest.raises(UserError, match=r"checkpoint.load_path=.*new/checkpoints is not there"):
        resumed(*argv, "checkpoint.load=true")


def test_a_run_whose_only_checkpoint_is_damaged_does_not_start_anew_unasked(tmp_path: Path) -> None:
    argv = [*FIRST[:-2], f"training.output_dir={tmp_path}/out", "training.resume=auto"]
    save(tmp_path / "out" / "checkpoints", 5, state={"settings": to_mapping(parse(argv)), "run": {}})
    with (tmp_path / "out" / "checkpoints" / "iter_5" / "metrics.csv").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(
        UserError, match=r"none is complete, iter_5 for one: metrics\.csv was altered: .*overwrite_output"
    ):
        resumed(*argv)
    overwrite = [*argv, "training.overwrite_output_dir=true"]
    assert resumed(*overwrite) == (parse(overwrite), None)


def test_off_means_off(saved: tuple[list[str], Path]) -> None:
    assert resumed(*saved[0]) == (parse(saved[0]), None)


def test_a_few_words_are_enough_and_only_what_is_of_one_start_is_forgotten(saved: tuple[list[str], Path]) -> None:
    config, path = resumed("command=run", "checkpoint.load=true", f"checkpoint.load_path={saved[1]}/iter_5")
    assert path == saved[1] / "iter_5"
    before = parse(saved[0])
    assert config.optimizer == before.optimizer
    assert config.schedule == before.schedule
    assert config.model == before.model
    assert config.extra == {"mine": {"note": "hello"}}
    assert (config.logging.every, config.checkpoint.save, config.checkpoint.config_name) == (7, True, "demo")
    assert save_folder(config) == save_folder(before)
    assert config.checkpoint.num_steps is None
    assert config.training.overwrite_output_dir is False


@pytest.mark.parametrize(
    ("given", "row"),
    [
        ("optimizer.lr=0.1", "optimizer.lr | 0.003 | 0.1"),
        ("training.seed=1", "training.seed | 42 | 1"),
        ("training.max_steps=30", "training.max_steps | 20 | 30"),
        ("checkpoint.config_name=clm-60m", "checkpoint.config_name | demo | clm-60m"),
        ("training.batch_size=4", "training.batch_size | 2 | 4"),
        ("training.deterministic=true", "training.deterministic | False | True"),
        ("+mine.note=bye", "extra.mine.note | hello | bye"),
    ],
)
def test_another_value_is_a_line_in_a_table_unless_it_is_to_replace(
    saved: tuple[list[str], Path], given: str, row: str
) -> None:
    load = ("command=run", "checkpoint.load=true", f"checkpoint.load_path={saved[1]}", given)
    with pytest.raises(UserError) as caught:
        resumed(*load)
    first, head, line = str(caught.value).splitlines()
    assert "checkpoint.overwrite_config=true" in first
    assert [cell.strip() for cell in head.split("|")] == ["setting", "checkpoint", "given"]
    assert " | ".join(cell.strip() for cell in line.split("|")) == row
    config, _ = resumed(*load, "checkpoint.overwrite_config=true")
    name, _, value = (cell.strip() for cell in line.split("|"))
    found: Any = to_mapping(config)
    for part in name.split("."):
        found = found[part]
    assert str(found) == value
    assert config.schedule == parse(saved[0]).schedule  # all else is as it was stored


@pytest.mark.parametrize(
    "given",
    [
        "checkpoint.save_steps=[7,9]",
        "checkpoint.keep=3",
        "run.num_threads=1",
        "logging.every=1",
        "compile.output_dir=elsewhere",
        "training.output_dir=elsewhere",
        "training.shard_optimizer=true",
        "training.eval_steps=3",
        "training.evaluate=false",
        "training.worker_timeout=3",
    ],
)
def test_where_how_fast_and_how_far_are_free(saved: tuple[list[str], Path], given: str) -> None:
    _, path = resumed("command=run", "checkpoint.load=true", f"checkpoint.load_path={saved[1]}", given)
    assert path == saved[1] / "iter_10"


def test_a_file_of_settings_is_compared_like_the_command_line(saved: tuple[list[str], Path], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optimizer: {lr: 0.5}\ntraining: {max_steps: 20}\n")
    with pytest.raises(UserError, match=r"optimizer\.lr *\| 0\.003 *\| 0\.5"):
        resumed(
            "command=run", f"config={tmp_path}/run.yaml", "checkpoint.load=true", f"checkpoint.load_path={saved[1]}"
        )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], (8, 1)),
        (["training.gradient_accumulation_steps=4"], (8, 1)),  # as before: other workers may need another one
        (["training.gradient_accumulation_steps=2"], (8, 2)),
        (["training.batch_size=4", "checkpoint.overwrite_config=true"], (8, 1)),
        (["training.gradient_accumulation_steps=2", "checkpoint.overwrite_config=true"], (None, 2)),
        (["training.global_batch_size=16", "checkpoint.overwrite_config=true"], (16, 1)),
    ],
)
def test_the_rows_of_a_step_stay_and_accumulation_follows(
    saved: tuple[list[str], Path], given: list[str], expected: tuple[int | None, int]
) -> None:
    config, _ = resumed("command=run", "checkpoint.load=true", f"checkpoint.load_path={saved[1]}", *given)
    training = config.training
    assert (training.global_batch_size, training.gradient_accumulation_steps) == expected


def test_going_on_again_and_again_with_the_same_command(saved: tuple[list[str], Path]) -> None:
    """The settings a resumed run stores give the same settings once more."""
    argv, folder = saved
    argv = [*argv, "training.resume=auto"]
    config, _ = resumed(*argv)
    save(folder, 15, state={"settings": to_mapping(config), "run": {"global_batch_size": 8}})
    assert resumed(*argv) == (config, folder / "iter_15")


def test_only_the_folder_that_its_run_wrote_is_gone_on_with_in_place(tmp_path: Path) -> None:
    argv = [*FIRST, "training.resume=auto", f"checkpoint.save_path={tmp_path}/saved"]
    ours, others = f"training.output_dir={tmp_path}/ours", f"training.output_dir={tmp_path}/others"
    state = {"settings": to_mapping(parse([*argv, ours])), "run": {"global_batch_size": 8}}
    save(tmp_path / "saved", 5, state=state)
    assert goes_on_in_place(*resumed(*argv, ours))
    assert not goes_on_in_place(*resumed(*argv, others))
    assert not goes_on_in_place(parse([*argv, ours]), None)


def test_a_folder_that_was_moved_with_its_checkpoints_is_gone_on_with_in_place(
    saved: tuple[list[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "out").rename(tmp_path / "moved")
    argv = [*saved[0][:-1], f"training.output_dir={tmp_path}/moved"]
    assert goes_on_in_place(*resumed(*argv, "training.resume=auto"))


def test_the_same_command_goes_on_with_other_workers_again_and_again(saved: tuple[list[str], Path]) -> None:
    """Its accumulation was for as many workers as there were: 8 rows of 2 are 4 for one worker, 2 for two."""
    argv = [*saved[0], "training.resume=auto"]
    config, _ = resumed(*argv)
    assert accumulation_steps(config.training, 1) == 4
    assert accumulation_steps(config.training, 2) == 2
    save(saved[1], 15, state={"settings": to_mapping(config), "run": {"global_batch_size": 8}})
    assert accumulation_steps(resumed(*argv)[0].training, 4) == 1


RUN = {"model": {"layers": 2, "width": 8}, "optimizer": {"name": "adamw"}, "precision": {"master": "none"}}
RUN |= {"seed": 1, "dataset": "abc", "global_batch_size": 8}  # type: ignore[dict-item]


def test_the_same_run_passes() -> None:
    require_same_run({"run": RUN}, RUN, path=Path("iter_1"))
    require_same_run({"run": RUN | {"seed": 2}}, RUN, path=Path("iter_1"), overwrite_config=True)


@pytest.mark.parametrize(
    ("change", "row", "may_be_replaced"),
    [
        ({"model": {"layers": 3, "width": 8}}, "model.layers | 2 | 3", False),
        ({"model": {"layers": 2}}, "model.width | 8 | –", False),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name | adamw | sgd", False),
        ({"precision": {"master": "float32"}}, "precision.master | none | float32", False),
        ({"seed": 2}, "seed | 1 | 2", True),
        ({"dataset": "def"}, "dataset | abc | def", True),
        ({"global_batch_size": 16}, "global_batch_size | 8 | 16", True),
    ],
)
def test_another_run_is_refused_field_by_field(change: dict[str, Any], row: str, may_be_replaced: bool) -> None:
    with pytest.raises(UserError) as caught:
        require_same_run({"run": RUN}, RUN | change, path=Path("iter_1"))
    first, head, line = str(caught.value).splitlines()
    assert [cell.strip() for cell in head.split("|")] == ["field", "checkpoint", "this run"]
    assert " | ".join(cell.strip() for cell in line.split("|")) == row
    assert ("overwrite_config" in first) == may_be_replaced
    if may_be_replaced:
        require_same_run({"run": RUN}, RUN | change, path=Path("iter_1"), overwrite_config=True)
    else:
        with pytest.raises(UserError, match="is of another run"):
            require_same_run({"run": RUN}, RUN | change, path=Path("iter_1"), overwrite_config=True)


def test_mistakes_are_answered_before_torch_is_imported() -> None:
    code = "import apps.training.checkpointing.resume, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
