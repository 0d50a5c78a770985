"""The loss's positions against a slow per-position reference, and its value against a sum over tokens in fp64."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from apps.training.loss import article_ids, counted_positions, make_batch, microbatches

PROMPT, COMPLETION, PADDING, SEPARATOR = range(4)


class Rows(NamedTuple):
    input_ids: np.ndarray
    token_type_ids: np.ndarray


def rows_of(*types: list[int]) -> Rows:
    token_types = np.array(types, dtype=np.int32)
    return Rows(np.arange(1, token_types.size + 1, dtype=np.int32).reshape(token_types.shape), token_types)


any_types = arrays(np.int32, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.integers(0, 3))


@given(any_types)
def test_a_position_counts_iff_its_target_is_no_padding_and_it_starts_from_no_separator(types: np.ndarray) -> None:
    rows = Rows(np.random.default_rng(0).integers(5, 100, types.shape, dtype=np.int32), types)
    batch = make_batch(rows)
    counted = 0
    for b in range(types.shape[0]):
        for t in range(types.shape[1]):
            last = t == types.shape[1] - 1
            counts = not last and types[b, t + 1] != PADDING and types[b, t] != SEPARATOR
            assert batch.mask[b, t].item() == counts
            assert batch.labels[b, t].item() == (rows.input_ids[b, t + 1] if counts else 0)
            counted += counts
    assert batch.num_counted == counted
    assert batch.num_tokens == sum(t != PADDING for t in types.flat)
    assert torch.equal(batch.input_ids, torch.tensor(rows.input_ids, dtype=torch.int64))


def test_a_sequence_starting_with_a_separator_does_not_train_on_the_next_articles_first_token() -> None:
    batch = make_batch(rows_of([SEPARATOR, COMPLETION, COMPLETION, SEPARATOR]))
    assert batch.mask.tolist() == [[False, True, True, False]]


def test_the_separator_itself_is_a_target() -> None:
    assert counted_positions(np.array([[COMPLETION, SEPARATOR, PADDING]])).tolist() == [[True, False, False]]


@given(any_types)
def test_article_ids_equal_a_walk_along_the_sequence(types: np.ndarray) -> None:
    for row, ids in zip(types, article_ids(types), strict=True):
        article, inside = 0, False
        for token_type, found in zip(row, ids, strict=True):
            if token_type == PADDING:
                inside = False
                assert found == 0
                continue
            article += not inside
            inside = token_type != SEPARATOR
            assert found == article


def test_prompt_completion_and_separator_of_one_article_share_its_id() -> None:
    types = np.array([[COMPLETION, SEPARATOR, PROMPT, COMPLETION, SEPARATOR, PADDING]])
    assert article_ids(types).tolist() == [[1, 1, 2, 2, 2, 0]]
    assert make_batch(rows_of(*types.tolist()), article_attention=True).article_ids is not None
    assert make_batch(rows_of(*types.tolist())).article_ids is None


def test_the_scale_counts_over_all_microbatches_of_the_step() -> None:
    batches = [make_batch(rows_of([1, 1, 1, 1])), make_batch(rows_of([1, 1, 2, 2]))]
    scales = [m["grad_scale"] for m in microbatches(batches, device="cpu", dtype=torch.float64)]
    assert torch.equal(scales[0], torch.tensor([[0.25, 0.25, 0.25, 0.0]], dtype=torch.float64))
    assert torch.equal(scales[1], torch.tensor([[0.25, 0.0, 0.0, 0.0]], dtype=torch.float64))


def test_an_all_padding_batch_weighs_exactly_nothing() -> None:
    (tensors,) = microbatches([make_batch(rows_of([2, 2, 2]))], device="cpu", dtype=torch.float32)
    assert torch.equal(tensors["grad_scale"], torch.zeros(1, 3))


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_step_cut_into_microbatches_has_the_loss_of_the_uncut_one(cut: int) -> None:
    rng = np.random.default_rng(1)
    types = rng.integers(0, 4, (4, 9), dtype=np.int32)
    ids = rng.integers(0, 11, (4, 9), dtype=np.int32)
    logits = torch.from_numpy(rng.normal(size=(4, 9, 11)))
    size = 4 // cut
    slices = [slice(size * i, size * i + size) for i in range(cut)]
    parts = microbatches([make_batch(Rows(ids[s], types[s])) for s in slices], device="cpu", dtype=torch.float64)
    loss = 0.0
    for part, where in zip(parts, slices, strict=True):
        log_p = logits[where].log_softmax(-1).gather(-1, part["labels"][..., None]).squeeze(-1)
        loss -= (part["grad_scale"] * log_p).sum().item()
    counted = counted_positions(types)
    mean = np.mean(
        [
            -logits[b, t].log_softmax(-1)[ids[b, t + 1]].item()
            for b, t in np.argwhere(counted)  # one position at a time, weight 1 each
        ]
    )
    assert loss == pytest.approx(mean, rel=1e-12)
