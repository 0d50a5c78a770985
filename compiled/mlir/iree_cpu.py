"""IREE on the CPU: the compiler and runtime that an MLIR step runs through when nothing else is asked for.

Tensors are lent, not copied: IREE reads the memory of its arguments where they lie, and torch that of the results.

Parameters are not updated in place. IREE would take their memory for results (`iree.abi.output`), and then computes
wrong values in silence where it reads an argument after it has begun to write it.

A process that has made a runtime must not fork: IREE's threads stay with the parent. Compiling makes none.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from compiled.mlir.compilers import CompileError, Compiler, Run
from compiled.mlir.extra import require_extra

_ALIGNMENT = 64  # bytes: IREE takes no buffer that begins elsewhere
_CPU = 1  # in DLPack's list of devices
_FLAGS = ("--iree-llvmcpu-target-cpu=host", "--iree-input-demote-f64-to-f32=false")


class IreeCompiler(Compiler):
    """Code for this machine's CPU, by IREE's `llvm-cpu` target."""

    flags: Sequence[str] = _FLAGS

    def __init__(self) -> None:
        require_extra("iree.compiler", "iree.runtime", "ml_dtypes")

    @property
    def version(self) -> str:
        import importlib.metadata

        return " ".join((importlib.metadata.version("iree-base-compiler"), *self.flags))

    def compile(self, module: bytes) -> bytes:
        from iree.compiler import CompilerToolError, compile_str

        try:
            return bytes(
                compile_str(module, target_backends=["llvm-cpu"], input_type="auto", extra_args=list(self.flags))
            )
        except CompilerToolError as error:
            raise CompileError(_reason(str(error))) from None

    def load(self, binary: bytes) -> Run:
        from iree.runtime import HalBufferView, VmContext, VmInstance, VmModule, VmVariantList, create_hal_module

        device, instance = _device(), VmInstance()
        module = VmModule.copy_buffer(instance, binary)
        context = VmContext(instance, [create_hal_module(instance, device), module])
        function = module.lookup_function(_public_function(module.function_names))

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            arguments = VmVariantList(len(tensors))
            for tensor in tensors:
                arguments.push_ref(_lent(device, tensor).ref)
            results = VmVariantList(8)  # grows
            context.invoke(function, arguments, results)
            return [_taken(device, results.get_as_object(index, HalBufferView)) for index in range(len(results))]

        return run


def _public_function(names: Sequence[str]) -> str:
    """The module's own function: IREE adds initialisers, and asynchronous twins where the dialect is `torch`."""
    (name,) = (name for name in names if not name.startswith("__") and not name.endswith("$async"))
    return name


def _reason(report: str) -> str:
    """One line of what `iree-compile` says: its errors, each once; else the last thing that it says."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    errors = dict.fromkeys(line.partition("error: ")[2] for line in lines if "error: " in line)
    return "; ".join(errors) or next((line for line in lines if line.startswith("Error code")), lines[-1])


@functools.cache
def _device() -> Any:
    """The CPU with as many threads as torch has now; one for the life of the process.

    A result's memory goes back to the device: tensors that live until the interpreter ends must find it there, in
    whatever order things are taken down. So this reference is never given up, and nanobind not asked to complain of it.
    """
    import ctypes

    from iree.runtime import _binding, flags, get_driver

    flags.parse_flags(f"--task_topology_group_count={torch.get_num_threads()}")
    with _not_seen_by_mpi():
        device = get_driver("local-task").create_default_device()
    _binding.disable_leak_checker()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(device))
    return device


@contextlib.contextmanager
def _not_seen_by_mpi() -> Iterator[None]:
    """Without the variables of mpirun, at which IREE would look for an MPI library of its own and stop without one."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith(("OMPI_", "PMI_"))}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _lent(device: Any, tensor: Tensor) -> Any:
    """A buffer view of the tensor's own memory; of a copy's where the memory is not aligned."""
    tensor = tensor.detach()
    if tensor.data_ptr() % _ALIGNMENT:
        tensor = tensor.clone()
    return device.from_dlpack_capsule(torch.utils.dlpack.to_dlpack(tensor))


def _taken(device: Any, view: Any) -> Tensor:
    """The buffer view's memory as a tensor."""
    return torch.from_dlpack(device.create_dlpack_capsule(view, _CPU, 0))
