"""Making a dataset, end to end: nothing lost, nothing leaked, the same again, and nothing left behind on failure."""

import hashlib
import json
from collections import Counter
from math import log

import numpy as np
import pytest
import yaml

from apps.training.data import corpus, encoding, prepare
from apps.training.data.options import PrepareOptions
from apps.training.data.prepare import default_dataset
from apps.training.data.storage import open_dataset
from apps.training.data.tokenizer import copy_tokenizer, load_tokenizer
from backends.errors import UserError

LENGTH = 16


@pytest.fixture
def texts(tmp_path):
    """A jsonl file of 60 articles of different lengths, each with words of its own."""
    articles = [" ".join(f"word{n}x{i}" for i in range(n % 7 + 2)) for n in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in articles))
    return articles


@pytest.fixture
def make(tmp_path):
    """Prepare a dataset named `name` with small settings and return it opened, with its metadata."""

    def run(name="out", **given):
        options = {"input": str(tmp_path / "texts.jsonl"), "vocab_size": 300, "max_seq_length": LENGTH, "num_splits": 2}
        options |= {"output_dir": str(tmp_path / name), "dev_ratio": 0.2} | given
        prepared = prepare.prepare(PrepareOptions(**options))
        length = options["max_seq_length"]
        return open_dataset(prepared.folder, max_seq_length=length, vocab_size=prepared.metadata["vocab_size"])

    return run


def decoded(dataset, rows):
    """The articles in the rows of a single file, decoded and cut at their separators."""
    found = rows.read(np.arange(rows.num_rows))
    kept = found.token_type_ids.ravel() != 2
    ids, types = found.input_ids.ravel()[kept], found.token_type_ids.ravel()[kept]
    backend = load_tokenizer(str(dataset.tokenizer_folder)).backend
    return [backend.decode(part[part != 0]) for part in np.split(ids, np.flatnonzero(types == 3) + 1) if len(part)]


def test_every_article_is_in_one_split_whole_and_in_order(texts, make):
    dataset = make(shuffle=False, num_splits=1)
    train, dev = decoded(dataset, dataset.train), decoded(dataset, dataset.dev)
    assert train == [text for text in texts if text not in dev]
    assert dev == [text for text in texts if text in dev]
    assert len(dev) > 3


def test_shuffling_changes_the_order_and_nothing_else(texts, make):
    plain, mixed = make("plain", shuffle=False, num_splits=1), make("mixed", num_splits=1)
    assert decoded(plain, plain.train) != decoded(mixed, mixed.train)
    assert sorted(decoded(plain, plain.train)) == sorted(decoded(mixed, mixed.train))
    assert decoded(plain, plain.dev) == decoded(mixed, mixed.dev)


def test_the_same_settings_give_the_same_bytes_for_any_number_of_workers(texts, make, monkeypatch):
    monkeypatch.setattr(encoding, "_GROUP_CHARACTERS", 100)

    def digests(name, **options):
        folder = make(name, test_ratio=0.1, **options).folder
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    one = digests("one", workers=1)
    assert one == digests("again", workers=1) == digests("many", workers=5)
    other_seed = digests("other", seed=7)
    assert one.keys() >= {"train_1_of_2.hdf5", "train_2_of_2.hdf5", "dev_1_of_1.hdf5", "test_files/test_1_of_1.jsonl"}
    assert one["train_1_of_2.hdf5"] != other_seed["train_1_of_2.hdf5"]


def test_metadata_has_their_keys_and_counts_that_are_true(texts, make):
    dataset = make(test_ratio=0.1)
    metadata = yaml.safe_load((dataset.folder / "metadata.yaml").read_text())
    assert metadata == dataset.metadata
    rows = dataset.train.read(np.arange(dataset.num_train_rows))
    of_type = Counter(rows.token_type_ids.ravel().tolist())
    tokens = Counter(rows.input_ids[rows.token_type_ids != 2].tolist())
    total = sum(tokens.values())
    expected = {
        "max_seq_length": LENGTH,
        "token_type_ids": True,
        "vocab_size": load_tokenizer(str(dataset.tokenizer_folder)).vocab_size,
        "tokenizer_model_type": "<class 'transformers.models.llama.configuration_llama.LlamaConfig'>",
        "number_of_training_files": 2,
        "number_of_dev_files": 1,
        "number_of_test_files": 1,
        "max_batch_size_train": dataset.num_train_rows // 2,
        "max_batch_size_dev": dataset.num_dev_rows,
        "train_sequences": dataset.num_train_rows,
        "dev_sequences": dataset.num_dev_rows,
        "train_input_tokens": total,
        "train_output_tokens": rows.input_ids.size,
        "train_prompt_tokens": 0,
        "train_completion_tokens": total,
        "train_padding_tokens": of_type[2],
        "train_articles": of_type[3],
        "train_tokens_dropped_from_packing": 0,
        "train_tokens_dropped_from_all_prompt": 0,
        "unigram_entropy_nats": pytest.approx(-sum(n / total * log(n / total) for n in tokens.values())),
    }
    assert {key: metadata[key] for key in expected} == expected
    assert dataset.unigram_entropy == metadata["unigram_entropy_nats"]
    assert dataset.dev_unigram_cross_entropy > dataset.unigram_entropy


def test_where_it_came_from_is_recorded(texts, make, tmp_path):
    dataset = make()
    file_bytes = (tmp_path / "texts.jsonl").read_bytes()
    inputs = json.loads((dataset.folder / "sha256" / "inputs.json").read_text())
    assert inputs == {"texts.jsonl": {"sha256": hashlib.sha256(file_bytes).hexdigest(), "size": len(file_bytes)}}
    assert dataset.metadata["input"] == "texts.jsonl"
    assert dataset.metadata["input_bytes"] == sum(len(text.encode()) for text in texts)
    (tmp_path / "same").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "same" / f"{number:03}.txt").write_text(text)
    assert make("other", input=str(tmp_path / "same")).metadata["input_sha256"] == dataset.metadata["input_sha256"]


def test_test_articles_are_kept_as_text_and_can_be_read_again(texts, make):
    dataset = make(test_ratio=0.2, num_splits=1)
    lines = (dataset.folder / "test_files" / "test_1_of_1.jsonl").read_text().splitlines()
    held = [json.loads(line)["text"] for line in lines]
    assert len(held) > 5
    assert not set(held) & {*decoded(dataset, dataset.train), *decoded(dataset, dataset.dev)}
    assert sorted([*held, *decoded(dataset, dataset.train), *decoded(dataset, dataset.dev)]) == sorted(texts)


def test_pairs_train_on_completions_and_keep_their_test_articles_as_pairs(make, tmp_path):
    pairs = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    dataset = make(input=str(tmp_path / "pairs.jsonl"), packing="single", max_seq_length=32, test_ratio=0.1)
    rows = dataset.train.read(np.arange(dataset.num_train_rows))
    backend = load_tokenizer(str(dataset.tokenizer_folder)).backend
    prompt = backend.decode(rows.input_ids[0][rows.token_type_ids[0] == 0])
    completion = backend.decode(rows.input_ids[0][rows.token_type_ids[0] == 1])
    assert {"prompt": prompt, "completion": completion.lstrip()} in pairs
    line = (dataset.folder / "test_files" / "test_1_of_1.jsonl").read_text().splitlines()[0]
    [kept] = json.loads(line)
    assert {"prompt": kept["prompt"], "completion": kept["completion"].lstrip()} in pairs


def test_of_a_single_text_the_end_is_held_out(make, tmp_path):
    text = " ".join(f"word{number}" for number in range(300))
    (tmp_path / "book.txt").write_text(text)
    dataset = make(input=str(tmp_path / "book.txt"), dev_ratio=0.1, num_splits=1)
    [train], [dev] = decoded(dataset, dataset.train), decoded(dataset, dataset.dev)
    assert text.startswith(train)
    assert text.endswith(dev)
    assert 0 <= len(text) - len(train) - len(dev) < 12  # one token gave way to the separator
    assert len(dev) / len(text) == pytest.approx(0.1, abs=0.02)


def test_a_long_text_in_parts_is_one_test_article(make, tmp_path, monkeypatch):
    from apps.training.data import sources

    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 40)
    (tmp_path / "many").mkdir()
    whole = {f"{n:02}.txt": "".join(f'line "{i}" of {n}\n' for i in range(9)) for n in range(20)}
    for name, text in whole.items():
        (tmp_path / "many" / name).write_text(text)
    dataset = make(input=str(tmp_path / "many"), test_ratio=0.1)
    lines = (dataset.folder / "test_files" / "test_1_of_1.jsonl").read_text().splitlines()
    held = [json.loads(line)["text"] for line in lines]
    assert held
    assert set(held) <= set(whole.values())


def test_a_given_tokenizer_and_its_chat_template_are_used_and_copied(make, texts, tmp_path):
    trained = make("trained")
    copy_tokenizer(str(trained.tokenizer_folder), tmp_path / "chat")
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    (tmp_path / "chat" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "chat.jsonl").write_text('[["hi", "hello"]]\n' * 30)
    dataset = make(
        input=str(tmp_path / "chat.jsonl"), tokenizer=str(tmp_path / "chat"), packing="greedy", max_seq_length=64
    )
    backend = load_tokenizer(str(dataset.tokenizer_folder)).backend
    rows = dataset.train.read(np.arange(1))
    first = rows.input_ids[0][: int(np.argmax(rows.token_type_ids[0] == 3))]
    assert backend.decode(first) == "[user]hi[assistant]hello"
    assert "GPT2Config" in dataset.metadata["tokenizer_model_type"]
    assert (dataset.tokenizer_folder / "config.json").is_file()
    assert load_tokenizer(str(dataset.tokenizer_folder)).chat is not None


def test_a_filled_folder_is_refused_and_replaced_when_told(texts, make, tmp_path):
    first = make()
    with pytest.raises(UserError, match=r"is not empty.*overwrite=true"):
        make()
    assert make(overwrite=True, seed=7).metadata["seed"] == 7
    assert first.metadata["seed"] == 42
    assert not list(tmp_path.glob(".*"))


def test_overwriting_spares_what_is_no_dataset(texts, make, tmp_path):
    with pytest.raises(UserError, match="not empty and no dataset"):
        make(".", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "single", "max_seq_length": 2}, "Nothing is left to train on.*packing=full"),
        ({"vocab_size": 100}, "vocab_size=100 is too small"),
        ({"dev_ratio": 0.6, "test_ratio": 0.5}, "leave nothing to train on"),
        ({"chat_template": "all"}, "chat_template=all, but the tokenizer 'train' has none"),
        ({"tokenizer": "no/such/folder"}, "Cannot load a tokenizer from 'no/such/folder'"),
        ({"input": "no/such/file.txt"}, "no file, folder or pattern 'no/such/file.txt'"),
    ],
)
def test_wrong_settings_are_one_line_and_leave_nothing(texts, make, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as caught:
        make("out/deep", **options)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"]


def test_a_place_that_cannot_be_written_is_refused_before_the_input_is_read(texts, make, monkeypatch):
    monkeypatch.setattr(prepare, "read_through", None)
    with pytest.raises(UserError, match=r"Cannot write output_dir=/proc/new: "):
        make("/proc/new")


@pytest.mark.parametrize("step", ["encode", "write_splits", "write_checksums"])
def test_ctrl_c_at_any_step_leaves_nothing(texts, make, tmp_path, monkeypatch, step):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"]


def test_empty_input_is_refused(make, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="holds no text to learn from"):
        make()


def test_the_default_dataset_is_made_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = corpus.files()[:30]
    monkeypatch.setattr(corpus, "files", lambda: few)
    folder = default_dataset(max_seq_length=64, vocab_size=300)
    assert folder.as_posix() == "outputs/datasets/corpus-vocab300-seq64"
    dataset = open_dataset(folder, max_seq_length=64, vocab_size=300, evaluate=True)
    assert dataset.metadata["python_version"].count(".") == 2
    monkeypatch.setattr(prepare, "prepare", lambda options: pytest.fail("prepared twice"))
    assert default_dataset(max_seq_length=64, vocab_size=300) == folder
