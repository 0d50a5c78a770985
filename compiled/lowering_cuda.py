"""CUDA regions as Inductor bundles. Touches torch's private compiler interfaces, like `lowering`."""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from compiled.lowering_pieces import pieces_in_place
from compiled.lowering_products import store_fp8_operands_once
from compiled.output_strides import has_strides_of
from compiled.regions import RunFunction


def lower_cuda(
    graph: GraphModule, inputs: Sequence[Tensor], path: Path, device_turns: AbstractContextManager[Any]
) -> None:
    """Compile `graph` into the file `path`; `device_turns` is entered while its kernels are tried."""
    from torch._inductor import config, standalone_compile

    store_fp8_operands_once()
    with ExitStack() as stack:
        stack.enter_context(pieces_in_place())
        # One run lets every kernel choose among its launch configurations; compiled again (from the cache, in no time),
        # the bundle holds the choices too, and a training run neither tries them anew nor may choose differently.
        if not _try(graph, inputs, device_turns):
            # Both ways of padding: a product's matrices, and the rows of any buffer that a result may be a view of.
            stack.enter_context(config.patch(shape_padding=False, comprehensive_padding=False))
            fits = _try(graph, inputs, device_turns)
            assert fits, "a region's results lie otherwise than its graph says, though nothing is padded"
        compiled: Any = standalone_compile(graph, list(inputs), dynamic_shapes="from_example_inputs")
    compiled.save(path=str(path), format="binary")


def _try(graph: GraphModule, inputs: Sequence[Tensor], device_turns: AbstractContextManager[Any]) -> bool:
    """Compile and run once; whether the results lie in memory as the graph says, and not as slices of padded ones."""
    from torch._inductor import standalone_compile

    compiled: Any = standalone_compile(graph, list(inputs), dynamic_shapes="from_example_inputs")
    with device_turns:
        fits = has_strides_of(graph, compiled(*(_example(tensor) for tensor in inputs)))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # others try theirs next
    return fits


def _example(fake: Tensor) -> Tensor:
    """Real data of a fake tensor's shape, stride and dtype: noise, or zeros, which are valid as an index."""
    real = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
    # by way of float32: 8-bit floats are not drawn
    return real.copy_(torch.randn(fake.shape, device=fake.device)) if real.is_floating_point() else real.zero_()


def load_cuda(path: Path) -> RunFunction:
    """A bundle as a function of the input tensors."""
    from torch._inductor import CompiledArtifact, config

    with config.patch(compile_threads=1):  # nothing is compiled: do not start a pool of compilers
        loaded: Any = CompiledArtifact.load(path=str(path), format="binary")

    @functools.wraps(loaded)
    def run(tensors: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return loaded(*tensors)

    return run
