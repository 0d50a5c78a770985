"""A region whose binary was made of an MLIR module, as a function like that of any other region."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.errors import UserError
from compiled.mlir.compilers import Compiler, find_compiler
from compiled.regions import Region, RegionSpec, RunFunction, TensorSpec

Read = Callable[[str, str], bytes]  # a member of the artifact, by its name and sha256


def load_regions(
    path: Path, target: Mapping[str, str], specs: Mapping[str, RegionSpec], read: Read
) -> dict[str, Region]:
    """The regions of the artifact at `path`, through the compiler that made their binaries."""
    if "compiler" not in target:
        raise UserError(
            f"Artifact {path} holds modules of the dialect {target['dialect']} and no binaries, and cannot run. "
            "Compile for dialect linalg, stablehlo or torch with compile.mlir.compiler=iree, or with your own compiler."
        )
    compiler = find_compiler(target["compiler"])
    return {
        name: Region(spec, load_region(spec, read(spec.file, spec.sha256), compiler)) for name, spec in specs.items()
    }


def load_region(spec: RegionSpec, binary: bytes, compiler: Compiler) -> RunFunction:
    """`binary` as a function of the region's inputs to its outputs, which writes in place what the region is to.

    The module's values are pure: behind the outputs it returns the new value of each input in `spec.mutated`, in the
    order of the inputs. `UserError` when it returns something else.
    """
    run = compiler.load(binary)
    written = [index for index, each in enumerate(spec.inputs) if each.name in spec.mutated]
    expected = [*spec.outputs, *(spec.inputs[index] for index in written)]

    def call(tensors: list[Tensor]) -> Sequence[Tensor]:
        results = _results(spec.name, expected, run([tensor.contiguous() for tensor in tensors]))
        results = _apart(results, tensors)
        for index, value in zip(written, results[len(spec.outputs) :], strict=True):
            tensors[index].copy_(value)
        return results[: len(spec.outputs)]

    return torch.no_grad()(call)


def _results(name: str, expected: Sequence[TensorSpec], given: Sequence[Any]) -> list[Tensor]:
    results = [each if isinstance(each, Tensor) else torch.from_dlpack(each) for each in given]
    shown = [(str(each.dtype).removeprefix("torch."), tuple(each.shape)) for each in results]
    wanted = [(each.dtype, each.shape) for each in expected]
    if shown != wanted:
        raise UserError(
            f"Region '{name}': the compiled MLIR module returned {_first_difference(shown, wanted)}. "
            "Its compiler has to keep the results of the module's function as they are."
        )
    return [result.contiguous() for result in results]


def _first_difference(given: Sequence[tuple[str, tuple[int, ...]]], expected: Sequence[Any]) -> str:
    if len(given) != len(expected):
        return f"{len(given)} results, expected {len(expected)}"
    index = next(i for i, pair in enumerate(zip(given, expected, strict=True)) if pair[0] != pair[1])
    (dtype, shape), (wanted, extents) = given[index], expected[index]
    return f"{dtype}{list(shape)} as result {index}, expected {wanted}{list(extents)}"


def _apart(results: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
    """Results in memory of their own. A function may return an argument, or one value twice; the step adds in place."""
    taken = {tensor.data_ptr() for tensor in arguments}
    apart = []
    for result in results:
        apart.append(result.clone() if result.data_ptr() in taken else result)
        taken.add(apart[-1].data_ptr())
    return apart
