"""Every region → its module, each in a process of its own; what cannot be lowered is one error that names it all."""

import functools
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule

from backends.errors import UserError
from compiled.capture import Captured
from compiled.mlir.importing import Dialect, import_region, warm_up
from compiled.mlir.isolation import Limits, Outcome, run_isolated
from compiled.mlir.modules import mutated_positions
from compiled.mlir.single_operators import Single, single_operators
from compiled.mlir.whole_step import WholeStep
from compiled.mlir.whole_step_arguments import NAME

Report = Callable[[str, Outcome], None]


@dataclass(frozen=True)
class MlirOptions:
    """What `compile.target=mlir` is asked for."""

    dialect: Dialect = "linalg"
    whole_step: bool = False
    compiler: str | None = None  # what makes binaries of the modules, as `find_compiler` knows it
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Refused:
    """Why an operator cannot be lowered, and where it stands."""

    reason: str
    regions: list[str]


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
    warm_up()
    outcomes = run_isolated(tasks, limits, at_a_time, report)
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.problem}
    if failed:
        graphs = {name: regions[name].graph for name in failed}
        raise _refusal(failed, unsupported(graphs, dialect, limits), dialect)
    return outcomes


def lower_whole(step: WholeStep, dialect: Dialect, limits: Limits) -> Outcome:
    """The whole step's module; its operators are those of the regions, which have been lowered before it."""
    task = functools.partial(import_region, step, step.arguments.examples(), dialect, name=NAME)
    outcome = run_isolated({NAME: task}, limits)[NAME]
    if outcome.problem:
        raise _refusal({NAME: outcome}, {}, dialect)
    return outcome


def unsupported(graphs: Mapping[str, GraphModule], dialect: Dialect, limits: Limits) -> dict[str, Refused]:
    """Operator → why it is refused when it is all there is, and the regions it stands in."""
    singles: dict[str, Single] = {}
    found_in: dict[str, list[str]] = {}
    for region, graph in graphs.items():
        for single in single_operators(graph):
            singles.setdefault(single.key, single)
            found_in.setdefault(single.key, []).append(region)
    problems: dict[str, Refused] = {}
    for key, what in _tried(list(singles.values()), dialect, limits).items():
        refused = problems.setdefault(singles[key].operator, Refused(what, []))
        refused.regions.extend(region for region in found_in[key] if region not in refused.regions)
    return problems


def _tried(singles: list[Single], dialect: Dialect, limits: Limits) -> dict[str, str]:
    """Key → problem of every one that fails: one process for all, and another one for the rest when it is lost."""
    problems: dict[str, str] = {}
    while singles:
        outcome = run_isolated({"": functools.partial(_try_singles, singles, dialect)}, limits)[""]
        if outcome.problem is None:
            return problems | outcome.value
        tried = [line.removeprefix(_TRYING) for line in outcome.output.splitlines() if line.startswith(_TRYING)]
        if not tried:
            return problems
        problems |= _failures(outcome.output)
        position = next(index for index, single in enumerate(singles) if single.key == tried[-1])
        problems[singles[position].key] = outcome.problem
        singles = singles[position + 1 :]
    return problems


_TRYING, _FAILED = "trying ", "failed "


def _try_singles(singles: list[Single], dialect: Dialect) -> dict[str, str]:
    """Runs in a process that may be lost, so that what was tried, and what failed, is written to fd 2 as well."""
    for single in singles:
        os.write(2, f"\n{_TRYING}{single.key}\n".encode())
        try:
            import_region(single.graph, single.inputs, dialect)
        except MemoryError:
            raise
        except Exception as error:
            os.write(2, f"\n{_FAILED}{type(error).__name__}: {_first_line(error)}\n".encode())
    with open("/proc/self/fd/2", "rb") as log:
        return _failures(log.read().decode(errors="replace"))


def _failures(output: str) -> dict[str, str]:
    """Key → reason, of the log: what MLIR reported of it, else the exception."""
    failures = {}
    for part in output.split(f"\n{_TRYING}")[1:]:
        key, _, rest = part.partition("\n")
        raised = [line.removeprefix(_FAILED) for line in rest.splitlines() if line.startswith(_FAILED)]
        if raised:
            failures[key] = (Outcome(output=rest).error_lines or raised)[0]
    return failures


def _refusal(failed: Mapping[str, Outcome], operators: Mapping[str, Refused], dialect: Dialect) -> UserError:
    parts = [f"{name} in {', '.join(it.regions)} ({_short(it.reason)})" for name, it in sorted(operators.items())]
    explained = {region for refused in operators.values() for region in refused.regions}
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
    return _short(outcome.problem if native or not outcome.error_lines else outcome.error_lines[0])


def _short(reason: str) -> str:
    return reason if len(reason) <= 120 else f"{reason[:117]}…"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason"])[0]
