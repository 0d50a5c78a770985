"""Every region → its module, each in a process of its own; what cannot be lowered is one error that names it all."""

import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from backends.errors import UserError
from compiled.capture import Captured
from compiled.mlir.importing import Dialect, import_region
from compiled.mlir.isolation import Limits, Outcome, run_isolated
from compiled.mlir.modules import mutated_positions
from compiled.mlir.single_operators import operator_name, single_operators

Report = Callable[[str, Outcome], None]


@dataclass(frozen=True)
class MlirOptions:
    """What `compile.target=mlir` is asked for."""

    dialect: Dialect = "linalg"
    whole_step: bool = False
    compiler: str | None = None  # what makes binaries of the modules, as `find_compiler` knows it
    limits: Limits = field(default_factory=Limits)


def lower_regions(
    regions: Mapping[str, Captured],
    dialect: Dialect,
    limits: Limits,
    at_a_time: int = 1,
    report: Report = lambda name, outcome: None,
) -> dict[str, Outcome]:
    """Region → outcome, whose value is the module's text. `UserError` with all that has none."""
    tasks = {
        name: functools.partial(
            import_region, each.graph, each.inputs, dialect, name=name, mutated=mutated_positions(each.spec)
        )
        for name, each in regions.items()
    }
    outcomes = run_isolated(tasks, limits, at_a_time, report)
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.problem}
    if failed:
        graphs = {name: regions[name].graph for name in failed}
        raise _refusal(failed, unsupported(graphs, dialect, limits, at_a_time), dialect)
    return outcomes


def unsupported(
    graphs: Mapping[str, GraphModule], dialect: Dialect, limits: Limits, at_a_time: int
) -> dict[str, tuple[str, list[str]]]:
    """Operator → what is wrong with it alone, and the regions it stands in: each distinct one is lowered by itself."""
    alone: dict[str, tuple[Node, GraphModule]] = {}
    found_in: dict[str, list[str]] = {}
    for region, graph in graphs.items():
        for key, node, single in single_operators(graph):
            alone.setdefault(key, (node, single))
            found_in.setdefault(key, []).append(region)
    limits = Limits(min(limits.timeout_s, 60.0), limits.memory_gb)
    tasks = {key: functools.partial(_import_single, single, dialect) for key, (_, single) in alone.items()}
    problems: dict[str, tuple[str, list[str]]] = {}
    for key, outcome in run_isolated(tasks, limits, at_a_time).items():
        if outcome.problem:
            name = operator_name(alone[key][0])
            _, known = problems.setdefault(name, (_what(outcome), []))
            known += [region for region in found_in[key] if region not in known]
    return problems


def _import_single(single: GraphModule, dialect: Dialect) -> bool:
    inputs = [node.meta["val"] for node in single.graph.nodes if node.op == "placeholder"]
    import_region(single, inputs, dialect)
    return True


def _refusal(
    failed: Mapping[str, Outcome], operators: Mapping[str, tuple[str, list[str]]], dialect: Dialect
) -> UserError:
    parts = [f"{name} in {_listed(regions)} ({what})" for name, (what, regions) in sorted(operators.items())]
    explained = {region for _, regions in operators.values() for region in regions}
    parts += [f"region {name} ({_what(outcome)})" for name, outcome in failed.items() if name not in explained]
    limits = [outcome for outcome in failed.values() if outcome.problem and "than" in outcome.problem]
    fix = "raise compile.mlir.timeout_s or compile.mlir.memory_gb" if limits else "choose another compile.mlir.dialect"
    return UserError(
        f"torch-mlir {importlib.metadata.version('torch-mlir')} cannot lower to {dialect}: {'; '.join(parts)}. "
        f"Expected operators that it knows: {fix}, or a backend that computes its product as an external call."
    )


def _what(outcome: Outcome) -> str:
    """Why there is no module, in few words: the first line that MLIR reported, else how the process ended."""
    assert outcome.problem is not None
    native = not outcome.problem.startswith(("TorchMlirCompilerError", "RuntimeError"))
    reason = outcome.problem if native or not outcome.error_lines else outcome.error_lines[0]
    return reason if len(reason) <= 120 else f"{reason[:117]}…"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))
