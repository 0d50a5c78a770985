"""What is taken for an equal region computes the same; whatever differs is compiled."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor import config, metrics

from compiled import lowering
from tests.region_cache import compile_or_copy, equal_regions_made_once


class Compiler:
    """Writes how often it was asked, as machine code of three kernels."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: object, inputs: object, *, options: dict[str, str]) -> str:
        self.runs += 1
        metrics.generated_kernel_count += 3
        Path(options["aot_inductor.output_path"]).write_text(f"code {self.runs}")
        return options["aot_inductor.output_path"]


Lower = Callable[..., tuple[str, int]]


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def lower(compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lower:
    """Machine code and number of kernels of a function of one tensor, written to a file of its own."""
    (tmp_path / "kept").mkdir()
    monkeypatch.setenv("TESTS_CXX_FOLDER", str(tmp_path / "kept"))

    def lower(function: Callable[[Tensor], Tensor], *shape: int, dtype: torch.dtype = torch.float32) -> tuple[str, int]:
        with lowering.fake_mode():
            inputs = [torch.empty(shape, dtype=dtype)]
        graph = lowering.trace(lambda x: (function(x),), inputs)
        metrics.reset()
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.so"
        written = compile_or_copy(compiler, graph, inputs, options={"aot_inductor.output_path": str(path)})
        assert written == str(path)
        return path.read_text(), metrics.generated_kernel_count

    return lower


def test_an_equal_region_is_compiled_once(compiler: Compiler, lower: Lower) -> None:
    assert lower(lambda x: x + 1, 2, 3) == lower(lambda x: x + 1, 2, 3) == ("code 1", 3)
    assert compiler.runs == 1


def test_whatever_differs_is_compiled(compiler: Compiler, lower: Lower, monkeypatch: pytest.MonkeyPatch) -> None:
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: x + 1, lambda x: x + 1.5, lambda x: x * 1, lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x + torch.tensor([1.0, 2.0, 4.0]),
    ]  # fmt: skip
    codes = [lower(function, 2, 3)[0] for function in functions]
    codes += [lower(functions[0], 3, 2)[0], lower(functions[0], 2, 3, dtype=torch.float64)[0]]
    with config.patch({"aot_inductor.compile_wrapper_opt_level": "O2"}):
        codes.append(lower(functions[0], 2, 3)[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    codes.append(lower(functions[0], 2, 3)[0])
    assert codes == [f"code {number}" for number in range(1, len(codes) + 1)]


def test_what_is_kept_for_a_person_is_made_anew(compiler: Compiler, lower: Lower) -> None:
    for _ in range(2):
        with config.patch({"trace.enabled": True}):
            lower(lambda x: x + 1, 2, 3)
    assert compiler.runs == 2


def test_what_failed_is_tried_again(compiler: Compiler, lower: Lower, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Compiler, "__call__", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            lower(lambda x: x + 1, 2, 3)
    assert lower(lambda x: x + 1, 2, 3)[0] == "code 1"


def test_it_serves_lowering_inside_alone(compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTS_CXX_FOLDER", str(tmp_path))
    monkeypatch.setattr(torch._inductor, "aot_compile", compiler)
    with lowering.fake_mode():
        inputs = [torch.empty(2, 3)]
    graph = lowering.trace(lambda x: (x + 1,), inputs)
    with equal_regions_made_once():
        assert [lowering.lower(graph, inputs, "cpu", tmp_path / name) for name in "ab"] == [3, 3]
    assert (tmp_path / "b").read_text() == "code 1"
    lowering.lower(graph, inputs, "cpu", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "code 2"
