"""What cannot be lowered is one error: every operator by name, with the regions it stands in."""

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backends.errors import UserError
from compiled import lowering as inductor
from compiled.capture import Captured, capture_function
from compiled.mlir import lowering
from compiled.mlir.isolation import Limits
from compiled.mlir.lowering import lower_regions

pytest.importorskip("torch_mlir", reason="the extra [mlir] is not installed")

LIMITS = Limits(60, 8)


def region(name: str, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Captured:
    with inductor.fake_mode():
        fakes = {f"x{index}": torch.empty(each.shape, dtype=each.dtype) for index, each in enumerate(inputs)}
    outputs = [f"y{index}" for index in range(len(function(*inputs)))]
    return capture_function(name, function, fakes, outputs)


def refused(regions: list[Captured], dialect: str = "linalg", limits: Limits = LIMITS) -> str:
    with pytest.raises(UserError) as error:
        lower_regions({each.spec.name: each for each in regions}, dialect, limits)  # type: ignore[arg-type]
    (line,) = str(error.value).splitlines()
    return line


def test_all_unsupported_operators_are_listed_by_name_and_region() -> None:
    square = torch.zeros(3, 3)
    regions = [
        region("first", lambda x: (torch.linalg.qr(x)[0] + 1, torch.linalg.det(x)), square),
        region("fine", lambda x: (x + 1,), square),
        region("second", lambda x: (torch.linalg.qr(x * 2)[1],), square),
    ]
    line = refused(regions)
    assert "aten.linalg_qr.default in first, second (" in line
    assert "aten._linalg_det.default in first (" in line
    assert "fine" not in line
    assert "aten.add" not in line
    assert "aten.mul" not in line
    assert "compile.mlir.dialect" in line


def test_what_one_dialect_lacks_another_may_have() -> None:
    """TOSA has no scattered sum; linalg does."""
    given = torch.zeros(5), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    scatter = region("scatter", lambda x, rows, values: (x.index_put((rows,), values, accumulate=True),), *given)
    assert "aten.index_put.default in scatter (failed to legalize" in refused([scatter], "tosa")
    assert b"func.func @scatter" in lower_regions({"scatter": scatter}, "linalg", LIMITS)["scatter"].value


def test_a_native_crash_names_the_operator_and_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """The importer dies of one operator wherever it meets it; the operators behind it are still tried."""
    importing = lowering.import_region

    def dies(graph: torch.fx.GraphModule, *arguments: object, **options: object) -> bytes:
        if any(node.target == torch.ops.aten.sin.default for node in graph.graph.nodes):
            os.kill(os.getpid(), signal.SIGSEGV)
        return importing(graph, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(lowering, "import_region", dies)
    x = torch.zeros(3, 3)
    line = refused([region("wave", lambda x: (torch.linalg.det(x.exp().sin().cos()),), x)])
    assert "aten.sin.default in wave (crashed with SIGSEGV)" in line
    assert "aten._linalg_det.default in wave (" in line
    assert "aten.exp" not in line
    assert "aten.cos" not in line


def test_a_region_that_takes_too_long_or_too_much_is_named_with_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    large = region("large", lambda x: (x + 1,), torch.zeros(2))
    monkeypatch.setattr(lowering, "import_region", lambda *_, **__: bytearray(2**32))
    line = refused([large], limits=Limits(60, 1))
    assert "aten.add.Tensor in large (needed more than 1 GiB of memory)" in line
    assert "raise compile.mlir.timeout_s or compile.mlir.memory_gb" in line
    one_region = {"large": large}
    monkeypatch.setattr(
        lowering, "import_region", lambda *_, name="", **__: time.sleep(60 if name in one_region else 0)
    )
    assert "region large (took longer than 1 s)" in refused([large], limits=Limits(1, 8))
