"""A trained tokenizer is a Hugging Face folder; an existing one is used as it is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training.data.tokenizer import check_vocab_size, copy_tokenizer, load_tokenizer, train_tokenizer
from backends.errors import UserError

TEXTS = ["def add(a, b):\n    return a + b\n", "the quick brown fox, the lazy dog; the end\n"] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300, place)
    return place


@pytest.fixture(scope="module")
def loaded(folder):
    return load_tokenizer(str(folder))


def test_a_trained_tokenizer_loads_with_auto_tokenizer(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 300
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        "<|endoftext|>",
        "<|endoftext|>",
        "<|pad|>",
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer("the fox").input_ids == load_tokenizer(str(folder)).backend.encode("the fox").ids


def test_the_same_text_gives_the_same_tokenizer(folder, tmp_path):
    train_tokenizer(TEXTS, 300, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@given(text=st.text())
def test_any_text_comes_back_exactly(loaded, text):
    assert loaded.backend.decode(loaded.backend.encode(text).ids, skip_special_tokens=False) == text


def test_little_text_gives_a_smaller_vocabulary(tmp_path):
    assert train_tokenizer(["ab"], 1000, tmp_path).vocab_size == 259


def test_a_vocabulary_must_hold_every_byte():
    with pytest.raises(UserError, match="vocab_size=257 is too small: expected 258"):
        check_vocab_size(257)


def test_loading_finds_the_ids_and_the_model_type(folder, tmp_path):
    trained = load_tokenizer(str(folder))
    assert (trained.eos_id, trained.pad_id, trained.bos_id, trained.vocab_size, trained.chat) == (0, 1, None, 300, None)
    assert trained.model_type == "<class 'transformers.models.llama.configuration_llama.LlamaConfig'>"
    copy_tokenizer(str(folder), tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text('{"model_type": "gpt2"}')
    copied = load_tokenizer(str(tmp_path / "copy"))
    assert copied.model_type == "<class 'transformers.models.gpt2.configuration_gpt2.GPT2Config'>"
    assert copied.backend.encode("the fox").ids == trained.backend.encode("the fox").ids


def test_a_tokenizer_that_starts_texts_with_bos_is_noticed(folder, tmp_path):
    from tokenizers import processors

    copy_tokenizer(str(folder), tmp_path)
    tokenizer = load_tokenizer(str(folder)).backend
    tokenizer.post_processor = processors.TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"bos_token": "<|pad|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path)).bos_id == 1


def test_what_is_no_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(
        UserError, match="Cannot load a tokenizer from .*expected a Hugging Face tokenizer|Expected"
    ) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_eos_is_refused(folder, tmp_path):
    copy_tokenizer(str(folder), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(str(tmp_path))


def test_a_chat_template_renders_and_refuses(folder, tmp_path):
    copy_tokenizer(str(folder), tmp_path)
    template = (
        "{% for m in messages %}{% if m['role'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.render([{"role": "user", "content": "hi"}], True) == "[user]hi[assistant]"
    with pytest.raises(ValueError, match=r"refuses the conversation \(no such role\)"):
        tokenizer.render([{"role": "bad", "content": "hi"}], True)
