"""What every test stands on: no network, one thread, the same random numbers each time."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from tests import warm_python

ROOT = str(Path(__file__).resolve().parents[1])

# Before anything imports torch or transformers; subprocesses inherit it.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL="O0",  # the calls around the kernels: a quarter less to compile; no numerics
    OMP_NUM_THREADS="1",  # the order of a sum depends on the number of threads
    MPLBACKEND="Agg",
    COLUMNS="120",
    PYTHONPATH=os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")])),  # for programs started by tests
)


def share_compiled_code() -> "tempfile.TemporaryDirectory[str] | None":
    """Let all processes of the session compile through `compiler_cache.py`; what it keeps goes with the result."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if sys.platform != "linux" or compiler is None or "TESTS_CXX" in os.environ:  # the last: a worker that shares
        return None
    # Always in the same place: Inductor's precompiled headers, 300 MB, are named after it. Called as the compiler is,
    # since Inductor asks the name whether it is GCC.
    script = Path(ROOT, ".pytest_cache", Path(compiler).name)
    script.parent.mkdir(exist_ok=True)
    through_cache = f'"{sys.executable}" -IS "{ROOT}/tests/compiler_cache.py"'
    script.write_text(  # what is not kept needs no Python: versions, headers, weights
        f'#!/bin/sh\ncase "$*" in *.[ch]pp*|*.wrapper.o*) exec {through_cache} "$@";; esac\nexec "{compiler}" "$@"\n'
    )
    script.chmod(0o755)
    folder = tempfile.TemporaryDirectory(prefix="substrate-tests-")
    os.environ.update(TESTS_CXX=compiler, TESTS_CXX_FOLDER=folder.name, CXX=str(script))
    return folder


def share_imports() -> "tuple[subprocess.Popen[bytes], tempfile.TemporaryDirectory[str]] | None":
    """Let programs of all processes of the session start by `warm_python.py`."""
    if sys.platform != "linux" or "TESTS_PYTHON" in os.environ or shutil.which("nvidia-smi"):
        return None  # what asked a GPU's driver anything, as an import may, cannot be forked
    folder = tempfile.TemporaryDirectory(prefix="substrate-tests-")
    server = warm_python.start(Path(folder.name))
    os.environ["TESTS_PYTHON"] = f"{folder.name}/python"
    return server, folder


COMPILED_CODE = share_compiled_code()
IMPORTS = share_imports()


def pytest_unconfigure() -> None:
    if COMPILED_CODE is not None:
        COMPILED_CODE.cleanup()
    if IMPORTS is not None:
        server, folder = IMPORTS
        with server, folder:  # its stdin is closed, at which it ends
            pass


settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of the README, then of docs/ first: they take minutes, and who had them at the end would end last."""
    items.sort(key=lambda item: (item.path.name != "test_readme.py", item.path.parent.name != "docs"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
