"""The steps so far, to the last bit."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training.checkpointing import step_rows
from apps.training.reporting.records import StepRecord

WHOLE, REAL = st.integers(0, 2**62), st.floats(allow_nan=False)
RECORDS = st.builds(StepRecord, WHOLE, WHOLE, REAL, REAL, WHOLE, WHOLE, REAL, st.none() | REAL)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows") / "metrics.csv"


@given(records=st.lists(RECORDS, max_size=4))
def test_every_number_comes_back_with_the_same_bits(path: Path, records: list[StepRecord]) -> None:
    path.write_text(step_rows.header() + step_rows.rows(records))
    found = step_rows.read_rows(path)
    assert found == records
    assert [math.copysign(1, each.loss) for each in found] == [math.copysign(1, each.loss) for each in records]
