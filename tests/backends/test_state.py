import contextlib
import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from backends import collect_state, route
from backends.base import Backend, StateSpec
from backends.errors import UserError
from backends.layers import BackendLinear
from backends.state import require_calibrated, reset_state, set_first_row
from compiled.stages import structure
from tests.backends.delayed_backend import DelayedBackend
from tests.backends.stateful_backend import ScaledBackend


@pytest.fixture
def layer() -> BackendLinear:
    layer = BackendLinear(4, 3)
    layer.set_backend(ScaledBackend())
    return layer


def state_of(layer: BackendLinear) -> tuple[float, int]:
    return layer.max_abs.item(), layer.step.item()


# ---- inside collect_state --------------------------------------------------------------------------------------


def test_collected_state_leaves_the_buffers_alone_until_it_is_committed(layer):
    with collect_state() as collected:
        layer(torch.full((2, 4), 5.0))
    assert state_of(layer) == (0.0, 0)
    collected.commit()
    assert state_of(layer) == (5.0, 1)


def test_a_second_forward_in_one_step_counts_once_and_gives_the_same_numbers(layer):
    x = torch.randn(2, 4)
    with collect_state() as collected:
        assert torch.equal(layer(x), layer(x))
    collected.commit()
    assert layer.step == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recompute_under_a_collector_counts_once_and_gives_exact_gradients(layer, use_reentrant):
    x = torch.randn(2, 4, requires_grad=True)
    with collect_state():
        plain = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    with collect_state() as collected:
        checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    collected.commit()
    assert torch.equal(layer.weight.grad, plain[0])
    assert layer.step == 1


def test_collected_state_has_the_full_names_of_the_buffers(layer):
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": layer})})
    with collect_state() as collected:
        layer(torch.ones(2, 4))
    assert set(collected.named(model)) == {name for name, _ in model.named_buffers()}
    assert set(collected.named(layer)) == {"max_abs", "step"}


def test_the_innermost_collector_gets_the_state(layer):
    with collect_state() as outer:
        with collect_state() as inner:
            layer(torch.ones(2, 4))
        assert (len(outer), len(inner)) == (0, 2)


def test_a_collector_is_closed_by_an_exception(layer):
    with pytest.raises(RuntimeError), collect_state():
        raise RuntimeError
    layer(torch.ones(2, 4))
    assert layer.step == 1


def test_collected_state_carries_no_gradient(layer):
    with collect_state() as collected:
        layer(torch.ones(2, 4, requires_grad=True))
    assert not any(value.requires_grad for value in collected.values())


def test_nothing_is_collected_in_evaluation(layer):
    with collect_state() as collected:
        layer.eval()(torch.ones(2, 4))
    assert not collected


# ---- outside: any PyTorch training loop ------------------------------------------------------------------------


def test_a_forward_in_training_updates_the_buffers_in_place(layer):
    buffer = layer.max_abs
    layer(torch.full((2, 4), 5.0))
    assert state_of(layer) == (5.0, 1)
    assert layer.max_abs is buffer


def test_evaluation_changes_nothing(layer):
    layer(torch.full((2, 4), 5.0))
    layer.eval()(torch.full((2, 4), 50.0))
    assert state_of(layer) == (5.0, 1)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_once_and_recomputes_with_the_state_of_the_first_forward(layer, use_reentrant):
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    x = torch.randn(2, 4, requires_grad=True)
    checkpoint(lambda x: layer(x).square(), x, use_reentrant=use_reentrant).sum().backward()
    assert layer.step == 1
    assert len(seen) == 2, "the forward was not recomputed"
    assert torch.equal(seen[0], seen[1])


def test_training_twice_before_a_backward_is_allowed(layer):
    first, second = layer(torch.randn(2, 4)), layer(torch.randn(2, 4))
    (first.sum() + second.sum()).backward()
    assert layer.step == 2


# ---- buffers ---------------------------------------------------------------------------------------------------


def test_a_change_of_dtype_leaves_the_state_as_its_spec_says(layer):
    layer(torch.full((2, 4), 5.3))
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.max_abs.dtype == torch.float32
    assert layer.max_abs == torch.tensor(5.3)
    assert layer.step.dtype == torch.int64


def test_a_layer_built_on_meta_gets_its_initial_state_with_its_memory():
    layer = BackendLinear(4, 3, device="meta")
    layer.set_backend(ScaledBackend())
    assert layer.max_abs.is_meta
    layer.to_empty(device="cpu")
    assert state_of(layer) == (0.0, 0)


def test_reset_state_follows_parameters_that_were_put_in_place_one_by_one():
    layer = BackendLinear(4, 3, device="meta")
    layer.set_backend(ScaledBackend())
    layer.load_state_dict(nn.Linear(4, 3).state_dict(), assign=True)
    reset_state(layer)
    layer(torch.ones(2, 4))
    assert state_of(layer) == (1.0, 1)


def test_state_is_no_part_of_a_checkpoint(layer):
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_a_new_backend_starts_with_its_own_state_only(layer):
    layer(torch.ones(2, 4))
    layer.set_backend(ScaledBackend(ScaledBackend.Config(levels=16)))
    assert state_of(layer) == (0.0, 0)
    layer.set_backend(BackendLinear(4, 3).backend)
    assert dict(layer.named_buffers()) == {}


def test_copies_and_pickles_have_state_of_their_own(layer):
    layer(torch.ones(2, 4))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert state_of(twin) == (1.0, 1)
        twin(torch.full((2, 4), 9.0))
        assert state_of(twin) == (9.0, 2)
    assert state_of(layer) == (1.0, 1)


# ---- ranges that have seen nothing, rows of the step -----------------------------------------------------------------


@pytest.fixture
def delayed() -> BackendLinear:
    layer = BackendLinear(4, 3)
    layer.set_backend(DelayedBackend())
    return layer


def test_evaluation_refuses_a_range_that_saw_nothing_and_names_the_layer(delayed):
    model = nn.ModuleDict({"mlp": delayed})
    with pytest.raises(UserError, match=r"This layer is not calibrated: least, most of backend .* saw no data yet"):
        delayed.eval()(torch.ones(2, 4))
    with pytest.raises(UserError, match="Layer 'mlp' is not calibrated"):
        require_calibrated(model)
    delayed.train()(torch.ones(2, 4))
    require_calibrated(model)
    delayed.eval()(torch.ones(2, 4))


def test_a_new_backend_has_seen_nothing_again(delayed):
    delayed(torch.ones(2, 4))
    delayed.eval()(torch.ones(2, 4))
    delayed.set_backend(DelayedBackend())
    with pytest.raises(UserError, match="not calibrated"):
        delayed(torch.ones(2, 4))


def test_the_first_row_is_given_and_never_returned(delayed):
    set_first_row(nn.ModuleDict({"mlp": delayed}), 6)
    with collect_state() as collected:
        whole = delayed(torch.ones(8, 4))
    assert "first_row" not in {name for _, name in collected}
    set_first_row(delayed, 8)
    with collect_state():
        assert torch.equal(delayed(torch.ones(2, 4)), whole[2:4])


def test_equal_layers_have_numbers_of_their_own_that_moving_and_a_new_backend_keep():
    def build(device: str) -> nn.Module:
        with torch.device(device):
            model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        route(model, [{"match": "*", "use": "tests.backends.delayed_backend:DelayedBackend"}])
        return model

    model, moved = build("cpu"), build("meta").to_empty(device="cpu")
    moved[0].set_backend(DelayedBackend())
    assert model[0].layer != model[1].layer
    assert [layer.layer.item() for layer in moved] == [layer.layer.item() for layer in model]
    moved[0].weight.data.copy_(model[1].weight.data.copy_(model[0].weight.data))
    assert not torch.equal(model[0](torch.ones(2, 4)), model[1](torch.ones(2, 4)))
    assert structure(model[0]) == structure(model[1]), "they still share a compiled region"


def test_integers_have_no_mean():
    with pytest.raises(UserError, match="has no exact mean"):
        StateSpec((), "int64")


def test_a_backend_that_forgets_its_new_state_is_noticed(delayed, monkeypatch):
    monkeypatch.setattr(DelayedBackend, "linear", lambda self, x, w, b, state, training: (x, {"step": state["step"]}))
    with pytest.raises(AssertionError, match=r"did not return its new state \['least', 'most', 'mean'\]"):
        delayed(torch.ones(2, 4))


class Remembering(Backend):
    """A plain product that knows the largest inputs of the last two steps."""

    def linear_state(self, in_features, out_features):
        return {name: StateSpec((), reduce="max") for name in ("last", "before")}

    def linear(self, x, weight, bias, state, *, training=False):
        new = {"last": x.detach().amax().to(torch.float32), "before": state["last"]}
        return torch.nn.functional.linear(x, weight, bias), new


@pytest.mark.parametrize("collects", [True, False])
def test_state_may_be_handed_on_under_another_name(collects):
    layer = BackendLinear(3, 3)
    layer.set_backend(Remembering())
    seen = []
    for size in (1.0, 2.0, 3.0):
        with collect_state() if collects else contextlib.nullcontext() as collected:
            layer(torch.full((2, 3), size))
        if collected is not None:
            collected.commit()
        seen.append((layer.last.item(), layer.before.item()))
    assert seen == [(1.0, 0.0), (2.0, 1.0), (3.0, 2.0)]
