"""A captured region → an MLIR module of one function, as text.

MLIR's tensors are values: an input that the region writes in place becomes a further result, its new value, behind the
region's outputs and in the order of the inputs. What may reuse which memory is said beside the module, in the manifest.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from compiled.mlir.decompositions import decomposition_table
from compiled.mlir.external_calls import has_external_calls, importer_class, lower_with_calls
from compiled.mlir.extra import require_extra

Dialect = Literal["linalg", "stablehlo", "tosa", "torch"]
DIALECTS: tuple[Dialect, ...] = ("linalg", "stablehlo", "tosa", "torch")
_OUTPUT_TYPES = {"linalg": "linalg-on-tensors", "stablehlo": "stablehlo", "tosa": "tosa", "torch": "torch"}


def import_region(
    graph: Callable[..., object],
    example_inputs: Sequence[Tensor],
    dialect: Dialect,
    *,
    name: str = "main",
    mutated: Sequence[int] = (),
) -> bytes:
    """The module's text. Function `name` takes the inputs in their order and gives graph's outputs, then new values.

    `graph`: a GraphModule, or any function that can be traced. `example_inputs` fix shapes and dtypes, whether they
    are real, fake or meta; `mutated`: positions of the inputs that the graph writes. Whatever torch-mlir raises is
    raised; it may also crash, so that `lowering.py` calls this in a process of its own.
    """
    return module_text(pure_graph(graph, example_inputs, mutated), dialect, name)


def module_text(pure: GraphModule, dialect: Dialect, name: str = "main") -> bytes:
    """What `pure_graph` gave as a verified module with one function."""
    from torch_mlir.extras.fx_importer import FxImporter
    from torch_mlir.fx import stateless_fx_import

    importer = FxImporter(context=new_context(), graph_node_importer_cls=importer_class())
    calls = has_external_calls(pure)
    wanted = _OUTPUT_TYPES["torch" if calls else dialect]
    module = stateless_fx_import(pure, output_type=wanted, model_name=name, fx_importer=importer)
    if calls and dialect != "torch":
        lower_with_calls(module, _OUTPUT_TYPES[dialect])
    if not module.operation.verify():
        raise RuntimeError(f"the verifier of MLIR refuses the {dialect} module")
    return str(module).encode()


def to_bytecode(text: bytes) -> bytes:
    """A module's text as MLIR bytecode."""
    require_extra("torch_mlir", what="MLIR bytecode")
    from torch_mlir._mlir_libs import _stablehlo
    from torch_mlir.ir import Module

    with new_context() as context:
        _stablehlo.register_dialect(context)
        file = io.BytesIO()
        Module.parse(text).operation.write_bytecode(file)
        return file.getvalue()


def new_context() -> Any:
    """An MLIR context that knows the dialect torch."""
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.ir import Context

    context = Context()
    torch_dialect.register_dialect(context)
    return context


def warm_up() -> None:
    """What every import needs and takes a second: forked processes find it done. Makes no context of MLIR."""
    import torch_mlir.fx

    assert torch_mlir.fx.stateless_fx_import
    pure_graph(lambda x: (x + 1,), [torch.zeros(1)], ())


def pure_graph(graph: Callable[..., object], example_inputs: Sequence[Tensor], mutated: Sequence[int]) -> GraphModule:
    """The graph without writes in place, in operators that torch-mlir knows; new values come behind the outputs."""
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    def pure(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = [tensor.clone() if index in mutated else tensor for index, tensor in enumerate(inputs)]
        outputs = graph(*values)
        assert isinstance(outputs, tuple | list)
        return (*outputs, *(values[index] for index in mutated))

    # fakes of another mode, and those that want a gradient, cannot be traced again; a table that is baked in is real
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype) for each in example_inputs]
    with torch.no_grad():
        traced = make_fx(
            functionalize(pure, remove="mutations"), decomposition_table=decomposition_table(), tracing_mode="fake"
        )(*inputs)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced
