"""How a call of an external function is written: `func.call` of a private declaration that carries the attributes."""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule, Node

OPERATOR = "substrate.external_call.default"


def has_external_calls(graph: GraphModule) -> bool:
    """Whether a traced graph calls a function of another program."""
    return any(str(node.target) == OPERATOR for node in graph.graph.nodes)


def lower_with_calls(module: Any, output_type: str) -> None:
    """Lower a module of the dialect torch in place, past the pass that refuses every call.

    What that pass is there for is done here: RuntimeError when an operator of torch is left.
    """
    from torch_mlir.ir import MLIRError
    from torch_mlir.passmanager import PassManager

    with module.context as context:
        context.emit_error_diagnostics = False  # into the exception
        pipeline = PassManager.parse(f"builtin.module(torch-backend-to-{output_type}-backend-pipeline)")
        try:
            pipeline.run(module.operation)
        except MLIRError as error:
            if "does not conform to the" not in str(error):
                raise
    left = sorted(set(re.findall(r"\b(torch(?:_c)?\.[\w.]+)[ (]", str(module))))
    if left:
        raise RuntimeError(f"failed to lower {', '.join(left)}")


def importer_class() -> Any:
    """torch-mlir's importer of nodes, which knows the operator of backends/kernels/external.py too."""
    from torch_mlir.dialects import func
    from torch_mlir.extras.fx_importer import GraphNodeImporter
    from torch_mlir.ir import Attribute, FlatSymbolRefAttr, FunctionType, InsertionPoint, StringAttr

    class Importer(GraphNodeImporter):
        def _import_torch_op_overload(self, loc: Any, node: Node, concrete_target: Any = None) -> None:
            if str(node.target) != OPERATOR:
                super()._import_torch_op_overload(loc, node, concrete_target)
                return
            arguments: Any = node.args
            tensors, function, attributes = arguments[:3]
            operands = [self.resolve_node_value(each) for each in tensors]
            results = [self._cc.tensor_to_vtensor_type(each) for each in node.meta["val"]]
            with loc:
                signature = FunctionType.get([each.type for each in operands], results)
                symbol = self._declared(function, attributes, signature)
                call = func.CallOp(results, FlatSymbolRefAttr.get(symbol), operands)
            self._multi_result_nodes.add(node)
            for index, value in enumerate(call.operation.results):
                self.bind_node_value(node, value, index)

        def _declared(self, function: str, attributes: str, signature: Any) -> str:
            """The declaration's name: the function's own, with a number behind it for further shapes or options."""
            body = self.fx_importer.module_op.regions[0].blocks[0]
            text = attributes_text({"function": function, **json.loads(attributes)})
            wanted = Attribute.parse(text)
            number = 0
            for each in body.operations:
                if "substrate.call" not in each.attributes:
                    continue
                if each.attributes["substrate.call"] == wanted and each.attributes["function_type"].value == signature:
                    return StringAttr(each.attributes["sym_name"]).value
                number += 1
            name = f"{function}_{number}" if number else function
            with InsertionPoint.at_block_begin(body):
                declared = func.FuncOp(name, signature, visibility="private")
            declared.attributes["substrate.call"] = wanted
            return name

    return Importer


def attributes_text(value: Any) -> str:
    """Plain values as an attribute of MLIR; what is null is left out of its dictionary."""
    if isinstance(value, Mapping):
        inside = (f'"{key}" = {attributes_text(each)}' for key, each in value.items() if each is not None)
        return "{" + ", ".join(inside) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(attributes_text, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value} : i64"
    if isinstance(value, float):
        return f"{value:.17e} : f64"
    return re.sub(r"\\u00([0-9a-f]{2})", r"\\\1", json.dumps(str(value), ensure_ascii=False))
