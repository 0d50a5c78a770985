"""Everything that touches torch's private compiler interfaces: tracing to graphs, splitting them, turning them into
machine code.

CPU regions become one shared library each (AOTInductor): running one needs no compiler and no cache. CUDA regions
become Inductor bundles (`standalone_compile`), because loading an AOTInductor library crashes inside `std::regex` on
some hosts. The names used here exist in torch 2.11 to 2.13; a newer torch is checked by this file's tests and nowhere
else.
"""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from backends.errors import UserError
from backends.kernels.in_capture import kernels_in_capture
from compiled.dear_activations import compute_cheap_ones_again
from compiled.lowering_cuda import load_cuda, lower_cuda
from compiled.lowering_products import any_weight, give_to_onednn
from compiled.lowering_speed import without_repetition
from compiled.output_strides import keeping_output_strides
from compiled.regions import RunFunction
from compiled.residual_gradients import join_residual_gradients
from compiled.rounded_weights import round_weights_again
from compiled.spec import float32_library


def fake_mode() -> FakeTensorMode:
    """Tensors with shapes and strides but no storage: a 70B model is captured in the memory of its graph."""
    return FakeTensorMode()


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Without the warnings that torch's compiler gives about its own code, which no user can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch(\.|$)")
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        yield


def trace_joint(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> GraphModule:
    """Forward and backward of a pure function of flat tensors as one graph; gradients for inputs that require them."""
    from torch._functorch import config
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._inductor.decomposition import select_decomp_table

    # An operator made of Triton kernels stays one operator until it is lowered: the graph says what it computes, and
    # does not hold kernels by numbers that count up within a process.
    with config.patch(decompose_custom_triton_ops=False), kernels_in_capture():
        # Decomposed as Inductor will anyway: the partitioner knows which of these operators are cheap to recompute.
        joint: Any = aot_export_joint_simple(
            function, tuple(inputs), trace_joint=True, decompositions=select_decomp_table()
        )
    graph = _without_assertions(joint[0] if isinstance(joint, tuple) else joint)
    join_residual_gradients(graph)
    return graph


def _without_assertions(graph: GraphModule) -> GraphModule:
    # Tracing a `.to(dtype)` leaves a check of its input's metadata, which would run as a kernel of its own on every
    # step.
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def split_joint(
    joint: GraphModule, num_outputs: int, num_parameters: int = 0, *, keeps_cheap: bool = True
) -> tuple[GraphModule, GraphModule]:
    """Min-cut the joint graph into forward and backward so that few and small activations cross between them.

    The first `num_parameters` inputs are the stage's parameters. `keeps_cheap`: see `compute_cheap_ones_again`.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    keeping_output_strides(joint, joint_graph_passes)
    round_weights_again(joint, num_parameters)
    if not keeps_cheap:
        compute_cheap_ones_again(joint)
    return min_cut_rematerialization_partition(joint, None, compiler="inductor", num_fwd_outputs=num_outputs)


def trace(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> GraphModule:
    """A function that may write its inputs in place or call `autograd.grad` inside, as one graph of aten operators."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with kernels_in_capture():
        graph = _without_assertions(make_fx(function, tracing_mode="fake")(*inputs))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _options(device_type: str) -> dict[str, Any]:
    from torch._inductor import config

    if device_type == "cuda":
        # Off: it assembles other variants of some reductions when a bundle is loaded; a run must not need an assembler.
        return {"dynamic_scale_rblock": False}
    # The thread count is a matter of the run, not of the artifact: two workers with one thread each use the same file.
    options: dict[str, Any] = {"cpp.dynamic_threads": True}
    if hasattr(config.aot_inductor, "enable_line_tables"):  # not every PyTorch has it
        # With them three quarters of an artifact are for debuggers.
        options["aot_inductor.enable_line_tables"] = False
    return options


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Code traced and lowered inside gives the same bits in every run, if `wanted`.

    Scattered sums (the embedding's gradient) would use atomics, whose order changes, also on a CPU; on CUDA, attention
    takes flash, whose backward has an ordered form, instead of cuDNN's.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def require_compiler(device_type: str) -> None:
    """`UserError` before any work when machine code for the CPU cannot be made here."""
    if device_type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "Compiling for the CPU needs a C++ compiler, and none was found on the PATH. Install g++ (Debian: "
            "apt-get install g++), or name one in the environment variable CXX. Running an artifact needs none."
        ) from None


def prepare_forks() -> None:
    """Do here, once, what every process that lowers CPU regions does first: import the compiler, and find out which
    vector instructions run here. 1.7 s of CPU time, which forked processes inherit."""
    with quiet_torch():
        import torch._inductor.compile_fx  # noqa: F401
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        pick_vec_isa()


def prepare_spawned(device_type: str, threads: int, device_turns: contextlib.AbstractContextManager[Any]) -> None:
    """Do in a process that starts from nothing what its first region would wait for.

    That is imports, the device's context, tables of patterns, and a pool of `threads` processes for kernels.
    """
    import torch.fx._graph_pickler
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    config.compile_threads = threads
    if threads > 1:
        AsyncCompile.warm_pool()
    with fake_mode():
        x = torch.empty(2, device=device_type)
    with tempfile.TemporaryDirectory() as folder:
        lower(trace(lambda x: (x + 1,), [x]), [x], device_type, Path(folder) / "warm", device_turns=device_turns)


def lower(
    graph: GraphModule,
    inputs: Sequence[Tensor],
    device_type: str,
    path: Path,
    debug: Path | None = None,
    device_turns: contextlib.AbstractContextManager[Any] | None = None,
) -> int:
    """Compile `graph` for `device_type` into the file `path`; returns the number of kernels the compiler made.

    `inputs` are (fake) tensors that fix shape, dtype, stride and device. With `debug` the generated code is kept in
    that folder. `device_turns` is entered while kernels are tried on a GPU.
    """
    from torch._inductor import config, metrics

    metrics.reset()
    options = _options(device_type)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(determinism(device_type == "cpu"))
        if debug is not None:
            debug.mkdir(parents=True, exist_ok=True)
            options |= {"trace.enabled": True, "trace.debug_dir": str(debug)}
        stack.enter_context(config.patch(options))
        stack.enter_context(quiet_torch())
        stack.enter_context(without_repetition())
        if device_type == "cuda":
            lower_cuda(graph, inputs, path, device_turns or contextlib.nullcontext())
        else:
            _lower_cpu(graph, inputs, path)
    return int(metrics.generated_kernel_count)


def _lower_cpu(graph: GraphModule, inputs: Sequence[Tensor], path: Path) -> None:
    from torch._inductor import aot_compile

    with_onednn = float32_library() == "onednn"
    if with_onednn:
        graph = give_to_onednn(graph)
    products = any_weight() if with_onednn else contextlib.nullcontext()
    # The compiler keeps its sources beside the library: let it work in a folder that goes away, with its parent if this
    # process is killed.
    with tempfile.TemporaryDirectory(prefix="lower-", dir=path.parent) as folder, products:
        library = aot_compile(graph, tuple(inputs), options={"aot_inductor.output_path": f"{folder}/region.so"})
        path.write_bytes(Path(str(library)).read_bytes())


def load(path: Path, device_type: str) -> RunFunction:
    """Machine code from `path` as a function of the input tensors. Nothing is compiled and no cache is read."""
    if device_type == "cuda":
        return load_cuda(path)
    # Not `aoti_load_package`: that one probes the CPU with a compiler, which takes seconds and needs one on the PATH.
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
    return runner.run


def host_modules(device_type: str) -> dict[str, bytes]:
    """What a run builds with a C compiler on first use, already built: file name → content.

    On CUDA that is Triton's bridge to the driver. The artifact carries it, so that a run needs no compiler.
    """
    if device_type != "cuda":
        return {}
    from triton.runtime import driver

    built: Any = driver.active.utils.load_binary  # a function of the extension module that Triton compiled
    path = Path(built.__self__.__file__)
    return {path.name: path.read_bytes()}


def install_host_modules(modules: dict[str, bytes]) -> None:
    """Let Triton load the `host_modules` of an artifact where it would build its own, unless it has them already.

    Triton's cache would not do: its key holds what the program `file` says of Python, and changes with the PATH.
    """
    if not modules:
        return
    from triton import knobs
    from triton.runtime import driver

    def take(name: str, source: str, folder: str, *_: Any, **__: Any) -> str:
        path = Path(folder) / next(file for file in modules if file.split(".")[0] == name)
        path.write_bytes(modules[path.name])
        return str(path)

    before, knobs.build.impl = knobs.build.impl, take
    cache = os.environ.get("TRITON_CACHE_DIR")
    try:
        with tempfile.TemporaryDirectory(prefix="substrate-triton-") as folder:
            os.environ["TRITON_CACHE_DIR"] = folder
            assert driver.active.utils  # loaded now, for as long as the process lives
    finally:
        knobs.build.impl = before
        del os.environ["TRITON_CACHE_DIR"]
        if cache is not None:
            os.environ["TRITON_CACHE_DIR"] = cache


def graph_text(graph: GraphModule) -> str:
    """The graph as readable code, with the shape of every value."""
    return str(graph.print_readable(print_output=False))


def node_value(node: Node) -> Tensor:
    """The fake tensor a node of a traced graph stands for."""
    return node.meta["val"]
