"""Which worker writes what."""

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apps.training.checkpointing.shares import assign, buffers_of, weight_files, weights_of

SIZES = st.dictionaries(st.text(max_size=3), st.integers(0, 1000), max_size=12)


@given(sizes=SIZES, world_size=st.integers(1, 5))
def test_every_tensor_has_one_worker_and_no_worker_is_far_behind(sizes: dict[str, int], world_size: int) -> None:
    owners = assign(sizes, world_size)
    assert owners.keys() == sizes.keys()
    loads = [sum(max(sizes[name], 1) for name in sizes if owners[name] == rank) for rank in range(world_size)]
    assert max(loads) - min(loads) <= max([1, *sizes.values()])
    assert set(owners.values()) == set(range(min(world_size, len(sizes))))


@given(sizes=SIZES, world_size=st.integers(1, 5))
def test_all_workers_agree_in_whatever_order_they_see_the_tensors(sizes: dict[str, int], world_size: int) -> None:
    assert assign(dict(reversed(sizes.items())), world_size) == assign(sizes, world_size)


def test_files_are_named_as_transformers_names_them() -> None:
    weights = weights_of(nn.Linear(3, 2))
    assert weight_files(weights, 1) == {"weight": (0, "model.safetensors"), "bias": (0, "model.safetensors")}
    assert weight_files(weights, 4) == {
        "weight": (0, "model-00001-of-00002.safetensors"),
        "bias": (1, "model-00002-of-00002.safetensors"),
    }


def test_a_tied_weight_is_stored_once_and_backend_state_apart() -> None:
    model = nn.Module()
    model.first, model.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model.second.weight = model.first.weight
    model.register_buffer("kept", model.first.weight.detach().clone())
    model.register_buffer("seen", model.first.weight.detach().clone(), persistent=False)
    assert weights_of(model).keys() == {"first.weight", "kept"}
    assert buffers_of(model).keys() == {"seen"}
