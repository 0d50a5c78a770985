"""What each block of a row is called with, seen in one forward: masks, rotary tables and the like differ among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from backends.errors import UserError

Batch = Mapping[str, Any]  # what the model is called with


class Reached(Exception):
    """What was to be seen was seen: nothing behind it need be computed."""


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with beside its hidden states: the model's own objects, held once where blocks share them.

    `keyword`: the name that the hidden states are given by; None: they come first.
    """

    keyword: str | None
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]

    def output(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states that `block` makes of `hidden`."""
        if self.keyword is None:
            output = block(hidden, *self.arguments, **self.named)
        else:
            output = block(**{self.keyword: hidden}, **self.named)
        return output if isinstance(output, Tensor) else output[0]


def block_calls(
    model: nn.Module, blocks: Mapping[str, nn.Module], batch: Batch
) -> tuple[Tensor, dict[str, BlockCall]] | None:
    """The hidden states in front of the first block, and each block's call by path; None: no block was computed.

    The model is computed up to the first linear layer behind the blocks: a head's outputs may be large. UserError for a
    block that is computed twice, or not at all while others are.
    """
    *_, last = blocks
    calls: dict[str, BlockCall] = {}
    seen: dict[str, Tensor] = {}

    def keep(path: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if path in calls:
            raise UserError(
                f"Block '{path}' is computed more than once a forward, so there is no one input to compress it for. "
                "Expected a model whose blocks are computed once each."
            )
        hidden, calls[path] = _split(path, arguments, named)
        seen.setdefault("first", hidden.detach())

    def stop(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        if last in calls:
            raise Reached

    inside = {part for block in blocks.values() for part in block.modules()}
    handles = [
        block.register_forward_pre_hook(
            lambda block, arguments, named, path=path: keep(path, arguments, named), with_kwargs=True
        )
        for path, block in blocks.items()
    ]
    handles += [
        part.register_forward_pre_hook(stop)
        for part in model.modules()
        if isinstance(part, nn.Linear) and part not in inside
    ]
    try:
        with suppress(Reached):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    for path in blocks:
        if calls and path not in calls:
            raise UserError(f"Block '{path}' was given nothing by a batch that other blocks of its row were given.")
    return (seen["first"], calls) if calls else None


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keep no keys and values: a block is computed again and again on the same tokens."""
    configs: dict[int, Any] = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    changed = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


def require_no_cache(batch: Batch) -> None:
    """UserError for a batch that asks for keys and values to be kept, or brings some."""
    for name in ("use_cache", "past_key_values"):
        if batch.get(name) is not None and batch[name] is not False:
            raise UserError(
                f"A calibration batch has {name}. Expected none: blocks are computed again and again on the same "
                "tokens. Leave it out."
            )


def _split(path: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, BlockCall]:
    """The hidden states, which come first or are the first tensor among the keywords, and the rest."""
    if arguments and isinstance(arguments[0], Tensor):
        return arguments[0], BlockCall(None, arguments[1:], dict(named))
    tensors = [name for name, value in named.items() if isinstance(value, Tensor)]
    if arguments or not tensors:
        raise UserError(f"Block '{path}' is called without hidden states. Expected a tensor as its first argument.")
    keyword = "hidden_states" if "hidden_states" in tensors else tensors[0]
    rest = {name: value for name, value in named.items() if name != keyword}
    return named[keyword], BlockCall(keyword, (), rest)
