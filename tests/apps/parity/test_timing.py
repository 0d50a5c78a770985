"""Timing leaves models as they were and takes turns."""

import torch

from apps.parity.timing import time_in_turns
from backends.routing import route
from tests.apps.parity.known_errors import batch, pair
from tests.backends.tiny_transformer import SCALED


def test_models_take_turns_and_nothing_of_them_changes() -> None:
    reference, other = pair()
    route(other, [{"match": "*", "use": SCALED}])
    order: list[str] = []
    reference.register_forward_pre_hook(lambda *_: order.append("reference"))
    other.register_forward_pre_hook(lambda *_: order.append("other"))
    before = {name: value.clone() for name, value in other.named_buffers()}
    rounds: list[int] = []
    first, second = time_in_turns([reference, other], batch(), rounds=3, on_round=lambda: rounds.append(1))
    assert order == ["reference", "reference", "other", "other"] * 4
    assert len(rounds) == 4
    assert first.ratio == 1.0
    assert min(first.forward, first.step, second.forward, second.step, second.ratio) > 0
    assert first.memory is None
    assert all(torch.equal(value, before[name]) for name, value in other.named_buffers())
    assert not any(model.training for model in (reference, other))
    assert all(parameter.grad is None for parameter in other.parameters())


def test_a_step_makes_the_gradient_of_every_trained_weight_in_training_mode() -> None:
    reference, other = pair()
    other.model.embed_tokens.weight.requires_grad_(False)
    passed: list[str] = []
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: passed.append(name))
    modes: list[bool] = []
    other.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    time_in_turns([reference, other], batch(), rounds=1, on_round=lambda: None)
    assert sorted(set(passed)) == sorted(name for name, p in other.named_parameters() if p.requires_grad)
    assert modes == [False, True] * 2
