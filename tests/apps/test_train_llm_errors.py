"""Bad input to `command=run`: one line that names what was given and the fix, exit code 2, nothing written."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apps.train_llm import program
from apps.training import memory
from apps.training.cli import run_main

SCRIPT = Path(__file__).resolve().parents[2] / "apps" / "train_llm.py"
Refused = Callable[..., str]


@pytest.fixture
def refused(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Start a run with changed settings in an empty folder; check that it is refused properly; return its error."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def start(one_line: bool = True, **changes: str | None) -> str:
        changed = settings | {key.replace("__", "."): value for key, value in changes.items()}
        before = snapshot(tmp_path)
        capsys.readouterr()  # what making the input printed
        code = run_main(program, [f"{key}={value}" for key, value in changed.items() if value is not None])
        error = capsys.readouterr().err
        assert code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1 or not one_line
        assert snapshot(tmp_path) == before
        return error

    return start


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dataset_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert "There is no dataset folder" in refused(training__dataset=str(tmp_path / "nowhere"))
    assert "not a dataset folder" in refused(training__dataset=str(tmp_path / "here"))


def test_a_dataset_for_another_sequence_length(refused: Refused) -> None:
    error = refused(model__max_seq_length="64")
    assert "This dataset (seq len 32) is not compatible with this model (seq len 64)" in error
    assert "model.max_seq_length=32" in error


def test_a_dataset_with_a_larger_vocabulary(refused: Refused, tmp_path: Path) -> None:
    LlamaConfig(vocab_size=100, hidden_size=32, num_attention_heads=2, num_hidden_layers=1).save_pretrained(
        tmp_path / "small"
    )
    error = refused(checkpoint__config_name=str(tmp_path / "small"))
    assert "(vocabulary 300) is not compatible with this model (vocabulary 100)" in error


def test_a_token_that_the_vocabulary_lacks(refused: Refused, tiny_dataset: Path, tmp_path: Path) -> None:
    """Found when the first rows are read, which is before the run's folder is made."""
    shutil.copytree(tiny_dataset, tmp_path / "data")
    for path in (tmp_path / "data").glob("train_*.hdf5"):
        with h5py.File(path, "r+") as file:
            file["input_ids"][:] = 299_000
    assert "299000" in refused(training__dataset=str(tmp_path / "data"))


def test_a_batch_larger_than_the_dataset(refused: Refused) -> None:
    error = refused(training__batch_size="64", training__gradient_accumulation_steps="16")
    assert "One step takes 1024 rows but the dataset" in error


def test_evaluation_without_a_dev_split(refused: Refused, tiny_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dataset, tmp_path / "data", ignore=shutil.ignore_patterns("dev_*"))
    assert "training.evaluate=false" in refused(training__dataset=str(tmp_path / "data"))


@pytest.mark.parametrize("harm", ["truncated", "foreign"])
def test_damaged_data(refused: Refused, tiny_dataset: Path, tmp_path: Path, harm: str) -> None:
    shutil.copytree(tiny_dataset, tmp_path / "data")
    file = sorted((tmp_path / "data").glob("train_*"))[0]
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        with h5py.File(file, "w") as content:
            content["something"] = [1, 2, 3]
    assert file.name in refused(training__dataset=str(tmp_path / "data"))


@pytest.fixture
def checkpoint(tiny_model: Path, tmp_path: Path) -> Path:
    """A sharded Hugging Face checkpoint."""
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model))
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    return tmp_path / "model"


@pytest.mark.parametrize("harm", ["missing", "corrupt"])
def test_damaged_weights(refused: Refused, checkpoint: Path, harm: str) -> None:
    shard = sorted(checkpoint.glob("model-*.safetensors"))[0]
    if harm == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-7])
    error = refused(checkpoint__config_name=None, checkpoint__model_name_or_path=str(checkpoint))
    assert shard.name in error


def test_weights_of_another_shape(refused: Refused, checkpoint: Path) -> None:
    config = LlamaConfig.from_pretrained(checkpoint)
    config.intermediate_size = 64
    config.save_pretrained(checkpoint)
    error = refused(one_line=False, checkpoint__config_name=None, checkpoint__model_name_or_path=str(checkpoint))
    assert "mlp.gate_proj.weight" in error


def test_an_output_folder_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Cannot write training.output_dir" in refused(training__output_dir=str(tmp_path / "file" / "out"))


def test_an_output_folder_that_holds_another_run(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.txt").touch()
    assert "training.overwrite_output_dir=true" in refused()


def test_a_model_that_does_not_fit_into_memory(refused: Refused) -> None:
    error = refused(checkpoint__config_name="llama-2-70b")
    assert "Not enough memory for this run: it needs about 1," in error
    assert "Choose a smaller model" in error


def test_a_batch_that_does_not_fit_into_memory(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device, local_world_size, at_most_gib: 8 * 2**20)
    assert "Lower training.batch_size" in refused(training__batch_size="64")


def test_no_artifact_is_answered_with_the_command_that_makes_one(refused: Refused, tmp_path: Path) -> None:
    error = refused(compile__target=None, compile__output_dir=str(tmp_path / "artifacts"))
    assert "command=compile" in error
    assert "model.max_seq_length=32 training.batch_size=4" in error


PROJECTION = r"model\.layers\.[0-9]+\.self_attn\.(q|k|v|o)_proj"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Cannot read rules file rules.yaml: there is no such file. These ship here: fp8.yaml, optical.yaml, "),
        ("", "Rules file rules.yaml holds nothing. Expected a list of rules, or one of the keys rules, layer_name_to_"),
        ("model: {}", "Rules file rules.yaml holds the keys model. Expected a list of rules"),
        ("- {match: '*.mlp.*', use: dens}", "Rule 0 of rules file rules.yaml: Unknown backend 'dens'. Did you mean "),
        (
            "- {match: '*.mpl.*', use: dense}",
            "Routing rule '*.mpl.*' of rules.yaml → dense matches no layer. Near it: "
            "model.layers.{0-1}.mlp.{gate,up,down}_proj.",
        ),
        (
            f"{{use_regex: true, layer_name_to_config: {{'{PROJECTION}': {{q_level: 16}}}}}}",
            f"Routing rule '{PROJECTION}' of rules.yaml: Unknown optical option 'q_level'. Did you mean 'q_levels'?",
        ),
        (
            f"{{use_regex: true, layer_name_to_config: {{'{PROJECTION}': {{q_levels: 1}}}}}}",
            f"Routing rule '{PROJECTION}' of rules.yaml: q_levels is 1. Expected 2 to 65536",
        ),
        (
            f"{{use_regex: true, layer_name_to_config: {{'{PROJECTION}_': {{}}}}}}",
            f"Routing rule '{PROJECTION}_' of rules.yaml → optical matches no layer. Near it: ",
        ),
        (
            f"{{use_regex: false, layer_name_to_config: {{'{PROJECTION}': {{}}}}}}",
            "matches no layer. It is compared as a name here, not as a pattern (use_regex: true or syntax: regex).",
        ),
        (
            f"{{use_regex: true, layer_name_to_config: {{'.*': {{}}, '{PROJECTION}': null}}}}",
            f"Routing rule '{PROJECTION}' of rules.yaml → dense takes no layer: '.*' before it took all 8",
        ),
        ("{use_regex: true, layer_name_to_config: {'*.mlp': {}}}", "Routing rule '*.mlp' of rules.yaml is no regular "),
        (
            "layer_name_to_config: {default: {q_levels: many}}",
            "The default backend of rules.yaml: Option 'q_levels' of",
        ),
    ],
)
def test_a_rules_file_with_a_mistake(refused: Refused, content: str | None, message: str) -> None:
    if content is not None:
        Path("rules.yaml").write_text(content)
    assert message in refused(backend__rules_file="rules.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[attention\n", "Cannot read rules file rules.toml: Expected ']' at the end of a table declaration"),
        (
            "[fc]\nq_level = 16\n",
            "Routing rule '*' of rules.toml [fc]: Unknown optical option 'q_level'. Did you mean ",
        ),
        (
            "[attention]\nq_lut_min = 2\n",
            "Routing rule '*' of rules.toml [attention]: q_lut_min is 2.0. Expected from 0",
        ),
        ("use_lora = true\n[fc]\n", "Section [lora] of rules file rules.toml has no r, but use_lora is true."),
        ("[fcc]\n", "Rules file rules.toml holds the keys fcc. Expected a list of rules, or one of the keys"),
    ],
)
def test_a_toml_rules_file_with_a_mistake(refused: Refused, content: str, message: str) -> None:
    Path("rules.toml").write_text(content)
    assert refused(backend__rules_file="rules.toml").startswith(f"error: {message}")


def test_a_rule_of_the_command_line_that_leaves_the_file_nothing(refused: Refused) -> None:
    Path("rules.yaml").write_text("- {match: '*.up_proj', use: dense}\n")
    error = refused(backend__rules="[{match: '*.mlp.*', use: dense}]", backend__rules_file="rules.yaml")
    assert error.startswith("error: Routing rule '*.up_proj' of rules.yaml → dense takes no layer: '*.mlp.*' before it")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "match: '*.mlp.*', use: dense, syntax: regex",
            "backend.rules[0]: Routing rule '*.mlp.*' is no regular expres",
        ),
        (
            "match: '.*mlp', use: dense, syntax: regex",
            "Routing rule '.*mlp' → dense matches no layer. A regular expres",
        ),
        ("match: '*', use: dense, syntax: regexp", "backend.rules[0]: Routing rule '*' has syntax='regexp'. Expected "),
        ("match: '*', use: dense, only: mlp", "backend.rules[0]: Routing rule '*' has only='mlp'. Expected linear or "),
        ("match: '*.mlp.*', use: dense, only: attention", "Routing rule '*.mlp.*' → dense takes no layer: it matches "),
    ],
)
def test_a_rule_with_a_mistake(refused: Refused, rule: str, message: str) -> None:
    assert refused(backend__rules=f"[{{{rule}}}]").startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("default", "message"),
    [
        ("{use: dens}", "Unknown backend 'dens'. Did you mean 'dense'?"),
        (
            "{q_levels: 16}",
            "backend.default: The default backend is {'q_levels': 16}. Expected a backend's name or {use",
        ),
        ("{use: optical, q_level: 16}", "Unknown optical option 'q_level'. Did you mean 'q_levels'?"),
        ("[optical]", "Wrong value backend.default=[optical]. Expected str or dict."),
    ],
)
def test_a_default_with_a_mistake(refused: Refused, default: str, message: str) -> None:
    assert refused(backend__default=default).startswith(f"error: {message}")


def test_a_mistake_in_the_settings_is_answered_before_pytorch_is_imported(tmp_path: Path) -> None:
    """A process of its own: the exit code, one line on stderr and no other word."""
    code = (
        "import sys, runpy; sys.argv = ['train_llm.py', 'command=run', 'optimizer.lr=fast']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "optimizer.lr" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_runs_out_of_memory_all_the_same_is_one_line_too(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")

    monkeypatch.setattr("apps.training.eager_program.EagerProgram.train_step", exhausted)
    assert run_main(program, [f"{key}={value}" for key, value in settings.items()]) == 2
    error = (
        "error: CUDA out of memory. Tried to allocate 2.00 GiB. Lower training.batch_size or model.max_seq_length.\n"
    )
    assert capsys.readouterr().err == error
