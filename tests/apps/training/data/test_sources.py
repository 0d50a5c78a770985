"""Every kind of input, read twice alike, and mistakes named by file and line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apps.training.data import sources
from apps.training.data.articles import Style
from apps.training.data.sources import open_source
from backends.errors import UserError


def texts(given, **options):
    """The articles' texts, parts of one joined; reading a second time must give the same."""
    source = open_source(str(given), Style(), **options)
    found, again = [], list(source.pieces())
    for piece in source.pieces():
        assert piece == again.pop(0)
        text = "".join(segment.text for segment in piece.segments)
        found[-1:] = [text] if piece.first and not found else [*found[-1:], text] if piece.first else [found[-1] + text]
    assert not again
    return found


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_corpus_is_an_input():
    source = open_source("corpus", Style())
    assert "pathlib.py" in dict(source.files)
    assert next(source.pieces()).segments[0].text


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert texts(tmp_path / "a.txt") == ["one\n\ntwo\n"]
    assert open_source(str(tmp_path / "a.txt"), Style()).files == (("a.txt", tmp_path / "a.txt"),)


def test_a_long_file_comes_in_parts_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 10)
    lines = "".join(f"line {number}\n" for number in range(9))
    (tmp_path / "a.txt").write_text(lines)
    pieces = list(open_source(str(tmp_path / "a.txt"), Style()).pieces())
    assert [piece.segments[0].text for piece in pieces][:2] == ["line 0\nline 1\n", "line 2\nline 3\n"]
    assert [(piece.first, piece.last) for piece in pieces] == [(True, False), *[(False, False)] * 3, (False, True)]
    assert [piece.segments[-1].end for piece in pieces] == [False] * 4 + [True]
    assert texts(tmp_path / "a.txt") == [lines]


def test_a_folder_is_read_by_name_hidden_files_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("B")
    (tmp_path / "sub" / "a.txt").write_text("SUB")
    (tmp_path / ".hidden").write_text("no")
    write_lines(tmp_path / "a.jsonl", {"text": "A1"}, {"text": "A2"})
    assert texts(tmp_path) == ["A1", "A2", "B", "SUB"]
    assert texts(tmp_path / "*.md") == ["B"]


def test_jsonl_lines_may_have_any_shape_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"prompt": "p", "completion": "c"}\n[["u", "a"]]\n{"text": ""}\n')
    assert texts(path) == ["one", "p c", "User: u\nAssistant: a"]


def test_parquet_rows_are_records_and_nulls_are_absent(tmp_path):
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    table = pyarrow.table({"text": ["one", None], "messages": [None, messages]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["one", "User: u\nAssistant: a"]


def test_what_the_datasets_package_reads(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == ["one", "two"]
    datasets.DatasetDict({"validation": rows}).save_to_disk(tmp_path / "splits")
    assert texts(tmp_path / "splits", split="validation") == ["one", "two"]
    with pytest.raises(UserError, match="Unknown split of .* 'train'.*Available: validation"):
        texts(tmp_path / "splits")
    (tmp_path / "a.csv").write_text("prompt,completion\np,c\n")
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"}]')
    assert texts(tmp_path / "a.csv") == ["p c"]
    assert texts(tmp_path / "a.json") == ["one", "two"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: {"train": rows})
    assert texts("somebody/some-dataset") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2: not JSON \(Expecting value at column 9\)"),
        ("a.jsonl", b'\n{"txt": "x"}\n', r"a.jsonl:2: no known keys among \['txt'\]"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl' is not UTF-8 text"),
        ("a.jsonl", b'{"text": "cut \\ud83d"}', r"a.jsonl:1: 'text' has half a character, \\ud83d at 4\. Mend"),
        ("a.jsonl", b'[{"role": "\\udc00", "content": ""}]', r"a.jsonl:1: 'role' has half a character, \\udc00 at 0"),
        ("a.jsonl", b'{"text": "x"}\n' + b"1" * 5000, r"a.jsonl:2: not readable \(.*5000 digits\)\. Mend the line"),
        ("a.jsonl", b"[" * 200_000, r"a.jsonl:1: not readable \(.*recursion"),
        ("a.txt", b"\x89PNG\r\n", "a.txt' is not UTF-8 text"),
        ("a.parquet", b"PAR1", "a.parquet' is not a whole parquet file"),
        ("a.json", b"{", "a.json' cannot be read as a json table"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_that_only_looks_saved_is_one_clear_line(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    write_lines(tmp_path / "a.jsonl", {"text": "one"})
    with pytest.raises(
        UserError, match="holds dataset_info.json.* cannot be read as a dataset that save_to_disk"
    ) as told:
        texts(tmp_path)
    assert "\n" not in str(told.value)


def test_files_that_are_not_text_can_be_left_out(tmp_path):
    contents = {
        "a.txt": b"one",
        "b.txt": b"ok\n" * 400_000 + b"\xff",
        "c.jsonl": b'{"text": "\xff"}',
        "d.txt": "zwölf".encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    given = str(tmp_path / "*")
    with pytest.raises(UserError, match="b.txt' is not UTF-8 text .* set skip_undecodable=true to leave out"):
        list(open_source(given, Style()).pieces())
    source = open_source(given, Style(), skips_undecodable=True)
    assert [piece.segments[0].text.strip() for piece in source.pieces()] == ["one", "zwölf"]
    assert [name for name, _ in source.files] == ["a.txt", "d.txt"]
    assert [path.name for path in source.left_out] == ["b.txt", "c.jsonl"]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "d.txt").unlink()
    with pytest.raises(UserError, match="No file of input=.* is UTF-8 text"):
        open_source(given, Style(), skips_undecodable=True)


def test_a_path_that_is_not_there_is_named_with_the_nearest(tmp_path):
    (tmp_path / "stories.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no file, folder or pattern .*storys.jsonl'. Did you mean 'stories.jsonl'\?"):
        open_source(str(tmp_path / "storys.jsonl"), Style())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty' holds no files"):
        open_source(str(tmp_path / "empty"), Style())


def test_a_hub_name_without_a_network_is_one_clear_line(tmp_path):
    code = (
        "from apps.training.data.articles import Style\nfrom apps.training.data.sources import open_source\n"
        "try:\n    open_source('somebody/some-dataset', Style())\nexcept ValueError as e:\n    print(e)\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    root = Path(__file__).parents[4]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=offline, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert done.stdout.startswith("Looking for 'somebody/some-dataset' on the Hugging Face hub")
    assert "As a Hugging Face dataset it cannot be loaded either: Couldn't reach 'somebody/some-dataset'" in done.stdout
