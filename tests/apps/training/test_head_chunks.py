"""In how many pieces the loss is computed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training.head_chunks import head_chunks, logit_bytes
from apps.training.step_plan import plan_step
from backends.errors import UserError
from tests.apps.training.plans import settings_of, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("models") / "tiny")


@given(st.integers(1, 5000), st.sampled_from([8, 200_000, 4 * 10**7, 4 * 10**9]), st.sampled_from(["cpu", "cuda"]))
def test_chosen_head_chunks_are_the_fewest_equal_ones_that_fit(tokens: int, a_token: int, kind: str) -> None:
    chunks = head_chunks(None, tokens, a_token, kind)
    budget = {"cpu": 64 * 2**20, "cuda": 2**30}[kind]

    def fits(pieces: int) -> bool:
        return tokens % pieces == 0 and (tokens // pieces * a_token <= budget or pieces == tokens)

    assert fits(chunks)
    assert not any(map(fits, range(1, chunks)))


def test_a_gpus_kernel_reads_logits_as_the_projection_left_them(folder: Path) -> None:
    precision = plan_step(settings_of(folder, "model.dtype=bfloat16")).precision
    assert logit_bytes("cuda", precision, with_teacher=False) == 2
    assert logit_bytes("cuda", precision, with_teacher=True) == 4
    assert logit_bytes("cpu", precision, with_teacher=False) == 4


def test_head_chunks_that_do_not_divide_the_batch_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"compile\.head_chunks=3 does not divide the 32 tokens"):
        plan_step(settings_of(folder, "compile.head_chunks=3"))
