"""What decides that two runs share an artifact."""

import ast
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from apps.training import step_plan
from apps.training.config import parse
from apps.training.step_plan import compile_command, plan_step
from backends.errors import UserError
from tests.apps.training.plans import SCALED, key_of, settings_of, write_config
from tests.backends.spare_backend import Spare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(
    "setting",
    [
        "training.batch_size=3",
        "model.max_seq_length=17",
        "model.dtype=float64",
        "model.dtype=bfloat16",
        "model.compute_dtype=bfloat16",
        "model.norm_dtype=float64",
        "model.residual_dtype=float64",
        "model.logits_dtype=float64",
        "optimizer.moments_dtype=bfloat16",
        "optimizer.master_weights=float32",
        "model.article_attention=true",
        f"backend.rules=[{{match: '*.up_proj', use: '{SCALED}'}}]",
        f"backend.default={SCALED}",
        "compile.head_chunks=2",
    ],
)
def test_a_setting_that_changes_the_graph_changes_the_key(folder: Path, setting: str) -> None:
    assert key_of(folder, setting) != key_of(folder)


def test_a_backends_option_changes_the_key(folder: Path) -> None:
    rule = f"backend.rules=[{{match: '*.up_proj', use: '{SCALED}', levels: %d}}]"
    assert key_of(folder, rule % 16) != key_of(folder, rule % 32)
    assert key_of(folder, rule % 256) == key_of(folder, f"backend.rules=[{{match: '*.up_proj', use: '{SCALED}'}}]")


def test_rules_that_route_alike_share_an_artifact(folder: Path) -> None:
    names = [f"{{match: 'model.layers.{layer}.mlp.up_proj', use: '{SCALED}'}}" for layer in (0, 1)]
    one = f"{{match: '*.up_proj', use: '{SCALED}'}}"
    assert key_of(folder, f"backend.rules=[{', '.join(names)}]") == key_of(folder, f"backend.rules=[{one}]")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 64},
        {"intermediate_size": 40},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 8},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"vocab_size": 97},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_field_of_the_model_changes_the_key(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert key_of(write_config(tmp_path / "other", **changes)) != key_of(folder)


@pytest.mark.parametrize(
    "changes",
    [{"bos_token_id": 7}, {"initializer_range": 0.5}, {"pretraining_tp": 2}, {"use_cache": False}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_field_that_no_operator_reads_leaves_the_key(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert key_of(write_config(tmp_path / "renamed", **changes)) == key_of(folder)


@pytest.mark.parametrize(
    "setting",
    [
        "optimizer.lr=0.7",
        "optimizer.weight_decay=0.3",
        "optimizer.beta1=0.5",
        "optimizer.beta2=0.5",
        "optimizer.eps=1e-4",
        "schedule.warmup_steps=9",
        "training.max_grad_norm=0.25",
        "training.max_grad_norm=null",
        "training.max_grad_value=0.5",
        "training.label_smoothing=0",
        "model.residual_dropout=0",
        "training.seed=7",
        "training.max_steps=3",
        "training.num_epochs=3",
        "training.dataset=/data/elsewhere",
        "training.gradient_accumulation_steps=4",
        "training.output_dir=/runs/elsewhere",
        "training.overwrite_output_dir=true",
        "training.evaluate=false",
        "training.eval_steps=5",
        "logging.every=10",
        "logging.progress=off",
        "logging.sample_prompt=Once",
        "run.num_threads=1",
        "run.cuda_graph=off",
        "compile.output_dir=/artifacts/elsewhere",
        "compile.verbose=true",
        "compile.debug=true",
        "compile.workers=1",
    ],
)
def test_a_setting_of_the_run_leaves_the_key(folder: Path, setting: str) -> None:
    assert key_of(folder, setting) == key_of(folder)


def test_compile_and_run_plan_the_same_step(folder: Path) -> None:
    assert (
        plan_step(parse(shlex.split(compile_command(settings_of(folder)))[2:])).spec
        == plan_step(settings_of(folder)).spec
    )


def test_another_version_of_the_optimizers_source_changes_the_key(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan_step(settings_of(folder)).spec
    original = step_plan.inspect.getfile
    edited = tmp_path / "adamw.py"

    def getfile(thing: Any) -> str:
        edited.write_text(Path(original(thing)).read_text() + "# edited\n")
        return str(edited)

    monkeypatch.setattr(step_plan.inspect, "getfile", getfile)
    after = plan_step(settings_of(folder)).spec
    assert before.optimizer["source"] != after.optimizer["source"]
    assert before.key != after.key


def test_the_source_of_everything_that_is_traced_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module of `backends` that zoo or compile room imports, but those that put nothing into a graph."""
    reached = {"backends/layers.py", "backends/joint.py", "backends/kernels/rms_norm.py", *modules_of_backends_in_use()}
    outside = "errors options outside_class precision ranks routing_errors routing_rules routing_table routing seeding"
    outside += " rules_file rules_forms yaml_reading"
    outside += " kernels/inference kernels/triton_inference"  # of writing text, which no step does
    of_each_backend = "backends/base.py"  # in the fingerprint of each
    reached -= {f"backends/{name}.py" for name in outside.split()} | {of_each_backend}
    before = step_plan._source_fingerprint()
    original = Path.read_bytes
    for edited in ("modelzoo/llama_block.py", "compiled/capture.py", *sorted(reached)):
        monkeypatch.setattr(
            Path,
            "read_bytes",
            lambda path, edited=edited: original(path) + (b"#" if path.as_posix().endswith(f"/{edited}") else b""),
        )
        assert step_plan._source_fingerprint() != before, edited


def modules_of_backends_in_use() -> set[str]:
    """Files that are imported, at their top or inside, by the zoo, the compile room, or one of these files."""
    root = Path(step_plan.__file__).parents[2]
    todo = [file for folder in ("modelzoo", "compiled") for file in (root / folder).rglob("*.py")]
    found: set[str] = set()
    while todo:
        for node in ast.walk(ast.parse(todo.pop().read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "backends":
                names = [str(node.module), *(f"{node.module}.{each.name}" for each in node.names)]
                files = {f"{name.replace('.', '/')}.py" for name in names}
                new = {file for file in files if (root / file).is_file()} - found
                found |= new
                todo += [root / file for file in new]
    return found


def test_the_code_that_computes_a_teacher_is_part_of_the_key(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint names the backend, which may be a file of the user's own."""
    stored = {"model.layers.0.mlp.up_proj": {"use": "tests.backends.spare_backend:Spare"}}
    given = f"training.distill.model_name_or_path={write_config(tmp_path / 'teacher', stored_layers=stored)}"
    before = key_of(folder, given)
    assert key_of(folder, given) == before
    monkeypatch.setattr(Spare, "fingerprint", lambda self: "of another source")
    assert key_of(folder, given) != before


def test_cuda_without_a_gpu_is_a_users_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"compile\.arch=cuda needs a CUDA device.*Use compile\.arch=cpu or auto"):
        plan_step(settings_of(folder, "compile.arch=cuda"))
    assert plan_step(settings_of(folder, "compile.arch=auto")).spec.device["kind"] == "cpu"


def test_split_masters_are_not_for_torch_mlir(folder: Path) -> None:
    given = ("compile.target=mlir", "model.dtype=bfloat16", "optimizer.master_weights=split")
    with pytest.raises(
        UserError, match=r"master_weights=split looks at the bits.*Use optimizer.master_weights=float32"
    ):
        plan_step(settings_of(folder, *given))


@pytest.mark.parametrize(("dialect", "can"), [("linalg", False), ("tosa", False), ("stablehlo", True), ("torch", True)])
def test_stochastic_rounding_is_for_dialects_that_cast_bits(dialect: str, can: bool, folder: Path) -> None:
    given = ("compile.target=mlir", "model.dtype=bfloat16", "optimizer.master_weights=stochastic")
    told = rf"does not lower to {dialect}, .*Use optimizer.master_weights=float32, or compile.mlir.dialect=stablehlo"
    with nullcontext() if can else pytest.raises(UserError, match=told):
        plan_step(settings_of(folder, *given, f"compile.mlir.dialect={dialect}"))
