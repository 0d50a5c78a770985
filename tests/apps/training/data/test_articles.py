"""Every shape of record, and what of it is read and what is learnt."""

import pytest

from apps.training.data.articles import Style, article
from apps.training.data.token_types import TokenType


def read(record, **style):
    """[(text, "prompt" or "completion", followed by EOS)]"""
    return [(s.text, TokenType(s.type).name.lower(), s.end) for s in article(record, Style(**style))]


def chatml(messages, add_generation_prompt):
    """A chat template without a tokenizer."""
    text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
    return text + "<assistant>" * add_generation_prompt


MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "how?"},
    {"role": "assistant", "content": "so"},
    {"role": "user", "content": "unanswered"},
]
TWO_TURNS = [
    ("User: hi\nAssistant:", "prompt", False),
    (" hello", "completion", True),
    ("User: how?\nAssistant:", "prompt", False),
    (" so", "completion", True),
]


def test_text_is_all_completion():
    assert read({"text": "once upon"}) == [("once upon", "completion", True)]
    assert read({"body": "once"}, text_keyword="body") == [("once", "completion", True)]


def test_a_pair_is_joined_by_exactly_one_space_unless_told_otherwise():
    pair = {"prompt": "1 + 1 = ", "completion": "2"}
    assert read(pair) == [("1 + 1 =", "prompt", False), (" 2", "completion", True)]
    assert read(pair, space_separator=False) == [("1 + 1 = ", "prompt", False), ("2", "completion", True)]


def test_keywords_can_be_chosen():
    record = {"question": "q", "answer": "a", "text": "not this"}
    assert read(record, prompt_keyword="question", completion_keyword="answer") == [
        ("q", "prompt", False),
        (" a", "completion", True),
    ]


def test_a_list_of_pairs_is_one_article():
    pairs = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}, {"completion": "d"}]
    assert read(pairs) == [
        ("a", "prompt", False),
        (" b", "completion", True),
        ("", "prompt", False),
        (" d", "completion", True),
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": MESSAGES},
        [["hi", "hello"], ["how?", "so"]],
        {"id": "0", "data": ["hi", "hello", "how?", "so", "unanswered"]},
    ],
    ids=["messages", "pairs of texts", "ultrachat"],
)
def test_a_conversation_learns_what_the_assistant_says(record):
    assert read(record) == TWO_TURNS


def test_messages_may_stand_alone_and_have_a_system_prompt():
    messages = [{"role": r, "content": c} for r, c in [("system", "Be kind."), ("user", "hi"), ("assistant", "hello")]]
    expected = [("System: Be kind.\nUser: hi\nAssistant:", "prompt", False), (" hello", "completion", True)]
    assert read(messages) == read({"messages": messages, "prompt": "ignored"}) == expected


def test_a_chat_template_writes_conversations_and_pairs_when_asked():
    expected = [("<user>hi</><assistant>", "prompt", False), ("hello</>", "completion", False)]
    assert read([["hi", "hello"]], render=chatml) == expected
    pair = {"prompt": "hi", "completion": "hello"}
    assert read(pair, render=chatml, render_pairs=True) == expected
    assert read(pair, render=chatml) == [("hi", "prompt", False), (" hello", "completion", True)]


def test_the_segments_of_a_template_join_to_what_it_renders():
    messages = [{"role": r, "content": c} for r, c in [("system", "s"), ("user", "a"), ("assistant", "b")]] * 2
    assert "".join(s.text for s in article(messages, Style(render=chatml))) == chatml(messages, False)


def test_a_template_that_rewrites_the_past_is_refused():
    def forgetful(messages, add_generation_prompt):
        return chatml(messages[-2:], add_generation_prompt)

    with pytest.raises(ValueError, match="rewrites earlier turns.*chat_template=plain"):
        article([["a", "b"], ["c", "d"]], Style(render=forgetful))


def test_nothing_to_learn_is_an_empty_article():
    assert read({"text": ""}) == read({"prompt": "a", "completion": ""}) == []
    assert read({"messages": [{"role": "user", "content": "hello?"}]}) == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"txt": "x"}, r"no known keys among \['txt'\], expected 'text'"),
        ({"text": 3}, "'text' is a int, expected text"),
        ({"prompt": ["x"], "completion": "y"}, "'prompt' is a list"),
        ({"messages": "hi"}, "'messages' is a str, expected a list"),
        ({"messages": [{"content": "hi"}]}, "a message without a role"),
        ({"messages": [{"role": "user"}]}, "'content' is a NoneType"),
        ({"data": "hi"}, "'data' is a str"),
        ({"data": ["hi", None]}, "'turn 2' is a NoneType"),
        ("just text", "a str of no known shape"),
        ([], "a list of no known shape"),
        (["a", "b"], "a list of no known shape"),
        (None, "a NoneType of no known shape"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(record, message):
    with pytest.raises(ValueError, match=message):
        article(record, Style())
