"""What every test stands on: no network, one thread, the same random numbers each time."""

import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = str(Path(__file__).resolve().parents[1])

# Before anything imports torch or transformers; subprocesses inherit it.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # the order of a sum depends on the number of threads
    MPLBACKEND="Agg",
    COLUMNS="120",
    PYTHONPATH=os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")])),  # for programs started by tests
)

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
