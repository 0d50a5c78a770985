"""The one file that knows torch's private compiler interfaces: this is where a newer torch would break first."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compiled import lowering


def fakes(*shapes: tuple[int, ...], requires_grad: bool = False) -> list[Tensor]:
    with lowering.fake_mode():
        return [torch.empty(shape, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes]


def gated(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (torch.tanh(x @ weight) * x,)


def targets(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def test_a_joint_graph_splits_into_forward_and_backward_that_equal_autograd() -> None:
    with lowering.quiet_torch():
        joint = lowering.trace_joint(gated, fakes((4, 3), (3, 3), requires_grad=True))
        forward, backward = lowering.split_joint(joint, 1)
    generator = torch.Generator().manual_seed(1)
    x, weight, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 3), (3, 3), (4, 3)))
    placeholders = [node.name for node in forward.graph.nodes if node.op == "placeholder"]
    output, *saved = forward(x, weight)
    names = [node.name for node in forward.graph.output_node().args[0][1:]]
    known = dict(zip(placeholders, (x, weight), strict=True)) | dict(zip(names, saved, strict=True))
    inputs = [known.get(node.name, grad) for node in backward.graph.nodes if node.op == "placeholder"]
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = torch.autograd.grad(gated(*leaves)[0], leaves, grad)
    torch.testing.assert_close(output, gated(x, weight)[0], rtol=1e-14, atol=0)
    for ours, theirs in zip(backward(*inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_region_compiles_as_it_does_for_a_user(tmp_path: Path) -> None:
    """With the code around kernels optimised, which all other tests do without: see `conftest.py`."""
    from torch._inductor import config

    with lowering.quiet_torch():
        graph = lowering.trace(gated, fakes((4, 3), (3, 3)))
    plain = {"aot_inductor.compile_wrapper_opt_level": "O1", "aot_inductor.precompile_headers": False}
    with config.patch(plain):
        lowering.lower(graph, fakes((4, 3), (3, 3)), "cpu", tmp_path / "region")
    x, weight = torch.randn(4, 3).double(), torch.randn(3, 3).double()
    torch.testing.assert_close(lowering.load(tmp_path / "region", "cpu")([x, weight])[0], gated(x, weight)[0])


def test_a_trace_holds_neither_metadata_checks_nor_dead_code() -> None:
    def cast(x: Tensor) -> tuple[Tensor, ...]:
        torch.exp(x)
        return (x.to(torch.float32) * 2,)

    with lowering.quiet_torch():
        traced = lowering.trace(cast, fakes((4,)))
        joint = lowering.trace_joint(cast, fakes((4,), requires_grad=True))
    assert not [name for name in targets(traced) if "assert" in name or "exp" in name]
    assert not [name for name in targets(joint) if "assert" in name]


def test_a_graph_reads_as_code_with_shapes() -> None:
    text = lowering.graph_text(lowering.trace(gated, fakes((4, 3), (3, 3))))
    assert "torch.ops.aten.mm.default" in text
    assert "f64[4, 3]" in text


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A region that writes an input in place and scatters (the case that would use atomics)."""

    def step(x: Tensor, index: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        total.copy_(total + x.sum())
        return (torch.zeros(5, 3, dtype=x.dtype).index_add(0, index, x.tanh()),)

    with lowering.fake_mode():
        inputs = [torch.empty(64, 3).double(), torch.empty(64, dtype=torch.int64), torch.empty(()).double()]
    folder = tmp_path_factory.mktemp("lowered")
    kernels = lowering.lower(lowering.trace(step, inputs), inputs, "cpu", folder / "region", debug=folder / "debug")
    assert kernels >= 1
    return folder


def test_machine_code_computes_the_graph_and_writes_its_inputs(lowered: Path) -> None:
    run = lowering.load(lowered / "region", "cpu")
    x, index, total = torch.randn(64, 3).double(), torch.arange(64) % 5, torch.tensor(1.0).double()
    expected = torch.zeros(5, 3).double().index_add(0, index, x.tanh())
    (first,) = run([x, index, total])
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-14)
    assert total.item() == pytest.approx(1.0 + x.sum().item())
    (second,) = run([x, index, total])
    assert torch.equal(first, second)


def test_lowering_leaves_one_file_the_generated_code_and_no_setting_changed(lowered: Path) -> None:
    assert sorted(path.name for path in lowered.iterdir()) == ["debug", "region"]
    assert (lowered / "region").read_bytes().startswith(b"\x7fELF")
    assert any("output_code" in path.name for path in (lowered / "debug").rglob("*"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_warnings_of_torchs_own_compiler_are_quiet_and_ours_are_not() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with lowering.quiet_torch():
            warnings.warn_explicit("theirs", UserWarning, "torch/_inductor/x.py", 1, module="torch._inductor.x")
            warnings.warn_explicit("ours", UserWarning, "compiled/x.py", 1, module="compiled.x")
    assert [str(warning.message) for warning in seen] == ["ours"]
