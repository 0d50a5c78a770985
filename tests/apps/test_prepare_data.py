"""The program: what it prints, what it refuses, and that mistakes show before anything heavy is loaded."""

import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from apps.prepare_data import main, program, summary
from apps.training.data.storage import open_dataset

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "apps" / "prepare_data.py"


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture
def text(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"word{number}" for number in range(400)))
    return tmp_path / "book.txt"


def test_a_dataset_is_made_and_summed_up(text, tmp_path, capsys):
    program([f"input={text}", f"output_dir={tmp_path / 'out'}", "vocab_size=300", "max_seq_length=16"])
    printed = capsys.readouterr().out
    dataset = open_dataset(tmp_path / "out", max_seq_length=16, evaluate=True)
    for expected in ("rows", "bytes per token", "unigram entropy", dataset.metadata["input_sha256"]):
        assert expected in printed
    assert f"Dataset saved at {tmp_path / 'out'}/" in printed
    assert f"{dataset.num_train_rows:,}" in printed
    assert summary(dataset.metadata) in printed


def test_files_that_are_not_text_are_left_out_when_asked_and_counted(text, tmp_path, capsys):
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n")
    given = [f"input={tmp_path}/*.txt", f"output_dir={tmp_path / 'out'}", "vocab_size=300", "max_seq_length=16"]
    program([*given, "skip_undecodable=true"])
    assert re.search(r"left out +1 file not in UTF-8", capsys.readouterr().out)
    metadata = open_dataset(tmp_path / "out", max_seq_length=16).metadata
    assert (metadata["number_of_files_left_out"], metadata["input_articles"]) == (1, 1)


def test_it_runs_from_inside_apps(text, tmp_path):
    done = run(f"input={text}", f"output_dir={tmp_path / 'out'}", "vocab_size=300", cwd=PROGRAM.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert open_dataset(tmp_path / "out", max_seq_length=256).num_train_rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["packing=ful"], "packing"),
        (["max_seq_len=3"], "max_seq_length"),
        (["dev_ratio=1.5"], "dev_ratio"),
        (["input=nothing.txt"], "no file, folder or pattern 'nothing.txt'"),
        (["tokenizer=nowhere/at/all"], "Cannot load a tokenizer"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments])
    assert main() == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert "Traceback" not in printed.out
    assert list(tmp_path.iterdir()) == []


def test_help_and_mistakes_load_nothing_heavy():
    code = (
        "import sys\nfrom apps.prepare_data import program\n"
        "try:\n    program(sys.argv[1:])\nexcept (SystemExit, ValueError):\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'h5py', 'tokenizers', 'pyarrow'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    for argument in ("--help", "packing=ful"):
        done = subprocess.run(
            [sys.executable, "-c", code, argument], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_ctrl_c_exits_with_130_and_leaves_nothing(tmp_path):
    """The signal comes once the temporary folder is there, so in the middle of the work."""
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # the test's own parent may ignore it
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), "output_dir=out"], cwd=tmp_path, stderr=subprocess.PIPE, preexec_fn=default
    ) as running:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob(".tmp-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    assert b"Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_with_no_settings_it_makes_the_embedded_corpus_dataset_in_time(tmp_path):
    start = time.monotonic()
    done = run(cwd=tmp_path)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(tmp_path / "outputs/datasets/corpus-vocab4096-seq256", max_seq_length=256, evaluate=True)
    assert dataset.num_train_rows > 8_000
    assert dataset.num_dev_rows > 400
    assert 5.5 < dataset.unigram_entropy < 7.5
    assert seconds < 40
