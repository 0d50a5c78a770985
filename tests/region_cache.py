"""Machine code of equal CPU regions is made once in a test session, for all its processes.

A step lowers equal blocks once, which it knows by their graphs and inputs; so do tests, whose small models are often
the same one. Tests of the compiler itself lower what they are about themselves.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor
from filelock import FileLock
from torch import Tensor
from torch.fx import GraphModule


def compile_or_copy(
    compile: Callable[..., str], graph: GraphModule, inputs: Sequence[Tensor], *, options: dict[str, Any]
) -> str:
    """`aot_compile`, or the library that it wrote for an equal graph before."""
    from torch._inductor import config, metrics

    folder = os.environ.get("TESTS_CXX_FOLDER")
    if folder is None or config.trace.enabled:  # the latter keeps what it makes
        return compile(graph, inputs, options=options)
    output = Path(options["aot_inductor.output_path"])
    kept = Path(folder, f"{key(graph, inputs)}.region")
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            before = metrics.generated_kernel_count
            library = compile(graph, inputs, options=options)
            Path(f"{kept}.kernels").write_text(str(metrics.generated_kernel_count - before))
            shutil.copy(library, f"{kept}.part")
            os.rename(f"{kept}.part", kept)
            return library
    shutil.copy(kept, output)
    metrics.generated_kernel_count += int(Path(f"{kept}.kernels").read_text())
    return str(output)


def key(graph: GraphModule, inputs: Sequence[Tensor]) -> str:
    """Names a region by what makes two blocks of a step one, and the compiler's settings."""
    from torch._inductor import config

    from compiled.capture import Captured
    from compiled.regions import RegionSpec, TensorSpec

    specs = [TensorSpec.of("", tensor) for tensor in inputs]
    identity = Captured(graph, list(inputs), RegionSpec("", specs, [])).identity
    tables = [attrgetter(str(node.target))(graph) for node in graph.graph.find_nodes(op="get_attr")]
    values = [(table.dtype, table.tolist()) for table in tables if isinstance(table, Tensor)]
    settings = (config.get_hash(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    return hashlib.sha256(repr((identity, values, settings)).encode()).hexdigest()[:32]


@contextlib.contextmanager
def equal_regions_made_once() -> Iterator[None]:
    """Inside, `lowering.lower` takes a CPU region's machine code from the session."""
    with mock.patch.object(torch._inductor, "aot_compile", partial(compile_or_copy, torch._inductor.aot_compile)):
        yield
