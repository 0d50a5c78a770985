"""A binary as a region: what it writes, what may share memory, and what is refused."""

from pathlib import Path

import pytest
import torch

from backends.errors import UserError
from compiled.mlir.loading import load_region, load_regions
from compiled.regions import RegionSpec, TensorSpec
from tests.compiled.mlir.python_compilers import NamedFunction

X, A = TensorSpec.of("x", torch.empty(3, 4)), TensorSpec.of("a", torch.empty(()))
SPEC = RegionSpec("step", [X, A], [TensorSpec.of("y", torch.empty(3, 4)), A], mutated=["a", "x"])


def test_new_values_are_written_and_results_have_memory_of_their_own() -> None:
    region = load_region(SPEC, b"doubling", NamedFunction())
    x, a = torch.nn.Parameter(torch.arange(12.0).view(4, 3)), torch.tensor(5.0)
    turned = x.t()  # not row by row: the function is given a copy that is, and the tensor its values
    y, b = region([turned, a])
    assert torch.equal(y, 2 * torch.arange(12.0).view(4, 3).t())
    assert torch.equal(x.detach(), torch.arange(12.0).view(4, 3) + 5)
    assert not y.requires_grad
    b.add_(1)
    assert float(a) == 5.0


def test_a_value_returned_twice_is_two_tensors() -> None:
    region = load_region(SPEC, b"twice_the_same", NamedFunction())
    x, a = torch.ones(3, 4), torch.tensor(0.0)
    y, b = region([x, a])
    y.add_(1)
    assert not x.any()
    assert (float(a), float(b)) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("one_short", "3 results, expected 4"),
        ("wider", "float64[3, 4] as result 2, expected float32[3, 4]"),
        ("flatter", "float32[12] as result 0, expected float32[3, 4]"),
    ],
)
def test_results_of_another_kind_are_refused_before_anything_is_written(name: str, told: str) -> None:
    region = load_region(SPEC, name.encode(), NamedFunction())
    x, a = torch.ones(3, 4), torch.tensor(2.0)
    with pytest.raises(UserError) as refused:
        region([x, a])
    assert f"Region 'step': the compiled MLIR module returned {told}." in str(refused.value)
    assert torch.equal(x, torch.ones(3, 4))


def test_the_compiler_is_the_one_that_the_artifact_names() -> None:
    target = {"kind": "mlir", "dialect": "linalg", "compiler": "tests.compiled.mlir.python_compilers:NamedFunction"}
    asked = []

    def read(name: str, digest: str) -> bytes:
        asked.append((name, digest))
        return b"doubling"

    spec = RegionSpec("step", [X, A], SPEC.outputs, mutated=["a", "x"], file="regions/step", sha256="12")
    (region,) = load_regions(Path("a.substrate"), target, {"step": spec}, read).values()
    assert asked == [("regions/step", "12")]
    assert float(region([torch.ones(3, 4), torch.tensor(1.0)])[0].sum()) == 24.0


def test_modules_without_binaries_do_not_run() -> None:
    with pytest.raises(UserError, match="a.substrate holds modules of the dialect tosa and no binaries"):
        load_regions(Path("a.substrate"), {"kind": "mlir", "dialect": "tosa"}, {}, lambda name, digest: b"")
