"""generate_text continues a text as plain transformers does, from any folder; every mistake is one line and code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from apps.generate_text import main
from modelzoo import build_model, load_config, save_model
from tests.modelzoo.llamas import llama_config

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 8
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights and a tokenizer of 300 tokens, as a run leaves it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<end>", eos_token="<end>")
    path = tmp_path_factory.mktemp("model")
    llama_config(vocab_size=300).save_pretrained(path / "config")
    return save_model(build_model(load_config(config_name=path / "config")), path / "out", tokenizer)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["generate_text.py", *arguments])
    code = main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def model_of(folder: Path) -> str:
    return f"checkpoint.model_name_or_path={folder}"


def test_greedy_is_what_plain_transformers_generates(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, monkeypatch, model_of(folder), f"prompt={PROMPT}", "max_new_tokens=12")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=12, do_sample=False, top_k=None)
    assert code == 0
    assert PROMPT + out == tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n"
    assert err.startswith("12 tokens in ")


def test_the_seed_decides_what_is_drawn(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(*arguments: str) -> str:
        return run(capsys, monkeypatch, model_of(folder), f"prompt={PROMPT}", "max_new_tokens=20", *arguments)[1]

    first = drawn("temperature=1.5", "seed=1")
    assert drawn("temperature=1.5", "seed=1") == first
    assert drawn("temperature=1.5", "seed=2") != first
    assert drawn("top_p=0.9", "seed=1") != drawn()


def test_one_candidate_is_greedy_at_any_temperature(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = (model_of(folder), f"prompt={PROMPT}", "max_new_tokens=20")
    greedy = run(capsys, monkeypatch, *prompt, "temperature=0")[1]
    assert run(capsys, monkeypatch, *prompt, "top_k=1")[1] == greedy
    assert run(capsys, monkeypatch, *prompt, "temperature=3", "top_p=1e-6")[1] == greedy


def test_a_temperature_next_to_0_is_0(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = (model_of(folder), f"prompt={PROMPT}", "max_new_tokens=20")
    greedy = run(capsys, monkeypatch, *prompt, "temperature=0")[1]
    for temperature in ("1e-40", "1e-6", "1e-5"):
        assert run(capsys, monkeypatch, *prompt, f"temperature={temperature}")[:2] == (0, greedy)


@pytest.mark.parametrize("said", [{"repetition_penalty": 5.0}, {"num_beams": 3}, {"max_length": 3}], ids=str)
def test_the_folders_generation_config_gives_the_ends_of_a_text_and_no_more(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, float],
) -> None:
    prompt = (f"prompt={PROMPT}", "max_new_tokens=20", "temperature=0")
    expected = run(capsys, monkeypatch, model_of(folder), *prompt)[:2]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | said))
    assert run(capsys, monkeypatch, model_of(tmp_path), *prompt)[:2] == expected


def test_a_text_ends_at_each_special_token_that_the_generation_config_lists(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(load_config(config_name=folder))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # the first token is chosen
    save_model(model, tmp_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = "<stop>"
    tokenizer.save_pretrained(tmp_path)
    for listed, count in (([0, 5], 1), (None, 9)):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        code, _, err = run(capsys, monkeypatch, model_of(tmp_path), f"prompt={PROMPT}", "max_new_tokens=9")
        assert (code, err.split(" ")[0]) == (0, str(count))


def test_an_empty_prompt_starts_a_text(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, monkeypatch, model_of(folder), "prompt=", "max_new_tokens=3")
    assert (code, err[:8]) == (0, "3 tokens")


def test_generation_ends_with_the_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(load_config(config_name=folder))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as every other: the first one, <end>, is chosen
    save_model(model, tmp_path, folder)
    code, out, err = run(capsys, monkeypatch, model_of(tmp_path), f"prompt={PROMPT}", "max_new_tokens=9")
    assert (code, out, err[:8]) == (0, "\n", "1 tokens")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "checkpoint.model_name_or_path is missing"),
        (["checkpoint.model_name_or_path={folder}"], "prompt is missing"),
        (["checkpoint.model_name_or_path=nowhere", "prompt=a"], "There is no folder 'nowhere'"),
        (["checkpoint.model_name_or_path={folder}", "prompt=a", "temprature=1"], "Did you mean 'temperature'?"),
        (["checkpoint.model_name_or_path={folder}", "prompt=a", "top_k=0"], "top_k=0"),
        (["checkpoint.model_name_or_path={folder}", "prompt=a", "top_p=1.5"], "top_p=1.5"),
        (["checkpoint.model_name_or_path={folder}", "prompt=a", "max_new_tokens=64"], "64 positions"),
        (["checkpoint.model_name_or_path={folder}", "prompt=a", "tokenizer=nowhere"], "tokenizer from 'nowhere'"),
        (["checkpoint.model_name_or_path={folder}/config", "prompt=a"], "There is no folder"),
    ],
)
def test_each_mistake_is_one_line(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: str,
) -> None:
    code, out, err = run(capsys, monkeypatch, *[argument.format(folder=folder) for argument in arguments])
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("damage", "told"), [("tokenizer.json", "tokenizer"), ("model.safetensors", "has no weights")])
def test_a_folder_with_a_file_missing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
    told: str,
) -> None:
    for file in folder.iterdir():
        if file.name != damage:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    code, _, err = run(capsys, monkeypatch, model_of(tmp_path), "prompt=a")
    assert code == 2
    assert told in err
    assert err.count("\n") == 1


def test_a_tokenizer_of_another_model_is_noticed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_config(vocab_size=40).save_pretrained(tmp_path / "config")
    save_model(build_model(load_config(config_name=tmp_path / "config")), tmp_path / "out", folder)
    code, _, err = run(capsys, monkeypatch, model_of(tmp_path / "out"), f"prompt={PROMPT}")
    assert code == 2
    assert "the model knows 40 (0 to 39)" in err


@pytest.mark.parametrize("place", ["", "apps"])
def test_it_runs_from_the_root_and_from_its_own_folder(folder: Path, place: str) -> None:
    script = "generate_text.py" if place else "apps/generate_text.py"
    command = [sys.executable, script, model_of(folder), f"prompt={PROMPT}", "max_new_tokens=2"]
    done = subprocess.run(command, cwd=ROOT / place, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("2 tokens in")


def test_help_imports_no_torch() -> None:
    program = (
        "import sys\nfrom apps.generate_text import generate\n"
        "try: generate(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "max_new_tokens: int = 64" in done.stdout
