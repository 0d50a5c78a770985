"""One record of any known shape → one article: stretches of text, each prompt or completion.

| record | becomes |
|---|---|
| {"text": …} | all completion |
| {"prompt": …, "completion": …}, or a list of such | prompt, completion, EOS, prompt, completion, EOS … |
| {"messages": [{"role": …, "content": …}]}, or the list alone | a conversation |
| [[user, assistant], …] | a conversation |
| {"data": [user, assistant, user, …]} (UltraChat) | a conversation |

A conversation is written by the tokenizer's chat template when it has one, otherwise plainly (`plain_chat`). What the
assistant says is completion, all else is prompt. A prompt nobody answers is left out. The loss counts the tokens of
both alike (apps/training/loss.py); packing tells them apart, and drops rows of prompts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from apps.training.data.token_types import TokenType

Messages = Sequence[Mapping[str, str]]


class Segment(NamedTuple):
    """A stretch of an article: its text, PROMPT or COMPLETION, and whether an EOS follows it."""

    text: str
    type: TokenType
    end: bool


class Piece(NamedTuple):
    """An article, or a part of a long one: `first` and `last` tell which."""

    segments: tuple[Segment, ...]
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class Style:
    """How records are read and written as text. `render(messages, add_generation_prompt)` is the chat template."""

    text_keyword: str = "text"
    prompt_keyword: str = "prompt"
    completion_keyword: str = "completion"
    space_separator: bool = True  # exactly one space between prompt and completion
    render: Callable[[Messages, bool], str] | None = None
    render_pairs: bool = False  # prompt/completion pairs go through the chat template as well


def article(record: Any, style: Style) -> tuple[Segment, ...]:
    """The segments of a record; empty when it holds nothing to learn. Raises ValueError telling what is wrong."""
    if isinstance(record, Mapping):
        if record.get("messages") is not None:
            return _conversation(_messages(record["messages"]), style)
        if style.completion_keyword in record:
            return _pairs([record], style)
        if style.text_keyword in record:
            return text_segments(_text(record[style.text_keyword], style.text_keyword))
        if record.get("data") is not None:
            return _conversation(_alternating(record["data"]), style)
        raise ValueError(f"no known keys among {sorted(map(str, record))}, {_expected(style)}")
    if isinstance(record, Sequence) and not isinstance(record, str) and record:
        if all(isinstance(part, Mapping) and "role" in part for part in record):
            return _conversation(_messages(record), style)
        if all(isinstance(part, Mapping) and style.completion_keyword in part for part in record):
            return _pairs(record, style)
        if all(isinstance(part, Sequence) and not isinstance(part, str) and len(part) == 2 for part in record):
            return _conversation(_alternating([text for pair in record for text in pair]), style)
    raise ValueError(f"a {type(record).__name__} of no known shape, {_expected(style)}")


def text_segments(text: str, end: bool = True) -> tuple[Segment, ...]:
    """Raw text: all of it is to be learnt."""
    return (Segment(text, TokenType.COMPLETION, end),) if text else ()


def plain_chat(messages: Messages) -> tuple[Segment, ...]:
    """Write a conversation without a template: `User: …` as a line to read, `Assistant: …` EOS to learn."""
    segments: list[Segment] = []
    prompt = ""
    for message in messages:
        if message["role"] == "assistant":
            segments.append(Segment(f"{prompt}Assistant:", TokenType.PROMPT, False))
            segments.append(Segment(f" {message['content'].lstrip(' ')}", TokenType.COMPLETION, True))
            prompt = ""
        else:
            prompt += f"{message['role'].capitalize()}: {message['content']}\n"
    return tuple(segments)


def template_chat(messages: Messages, render: Callable[[Messages, bool], str]) -> tuple[Segment, ...]:
    """Write a conversation by a chat template. Each answer is what its message adds to the text rendered so far.

    Raises ValueError for a template that writes earlier turns differently once later ones follow: prompt and answer
    cannot be told apart then.
    """
    segments: list[Segment] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:index], True) if index else ""
        after = render(messages[: index + 1], False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError("the chat template rewrites earlier turns when later ones follow; use chat_template=plain")
        segments.append(Segment(before[len(done) :], TokenType.PROMPT, False))
        segments.append(Segment(after[len(before) :], TokenType.COMPLETION, False))
        done = after
    return tuple(segments)


def _conversation(messages: Messages, style: Style) -> tuple[Segment, ...]:
    return plain_chat(messages) if style.render is None else template_chat(messages, style.render)


def _pairs(pairs: Sequence[Mapping[str, Any]], style: Style) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    messages: list[Mapping[str, str]] = []
    for pair in pairs:
        prompt = _text(pair.get(style.prompt_keyword) or "", style.prompt_keyword)
        completion = _text(pair[style.completion_keyword] or "", style.completion_keyword)
        if not completion:
            continue
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        if style.space_separator:
            prompt, completion = prompt.rstrip(" "), " " + completion.lstrip(" ")
        segments.append(Segment(prompt, TokenType.PROMPT, False))
        segments.append(Segment(completion, TokenType.COMPLETION, True))
    if style.render_pairs:
        return _conversation(messages, style)
    return tuple(segments)


def _messages(value: Any) -> Messages:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"'messages' is a {type(value).__name__}, expected a list of role and content")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError("a message without a role, expected {'role': …, 'content': …}")
        _text(message["role"], "role")
        _text(message.get("content"), "content")
    return value


def _alternating(value: Any) -> Messages:
    """User and assistant in turn."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"'data' is a {type(value).__name__}, expected a list of texts, user and assistant in turn")
    roles = ("user", "assistant")
    return [{"role": roles[turn % 2], "content": _text(text, f"turn {turn + 1}")} for turn, text in enumerate(value)]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"'{name}' is a {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell it, UTF-8 cannot
        half = f"\\u{ord(value[error.start]):04x}"
        raise ValueError(
            f"'{name}' has half a character, {half} at {error.start}. Mend or leave out the line"
        ) from None
    return value


def _expected(style: Style) -> str:
    return (
        f"expected '{style.text_keyword}', '{style.prompt_keyword}' and '{style.completion_keyword}', a list of such "
        f"pairs, 'messages', [user, assistant] pairs, or 'data' (see text_keyword, prompt_keyword, completion_keyword)"
    )
