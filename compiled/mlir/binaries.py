"""Modules → binaries, by any compiler, each in a process of its own: compilers are native code too."""

import functools
from collections.abc import Mapping

from backends.errors import UserError
from compiled.mlir.compilers import find_compiler
from compiled.mlir.isolation import Limits, Outcome, run_isolated


def compile_modules(
    modules: Mapping[str, bytes], compiler: str, limits: Limits, at_a_time: int = 1
) -> dict[str, Outcome]:
    """Module → outcome, whose value is the binary. `UserError` with all that have none, and the compiler's reasons."""
    made = find_compiler(compiler)
    tasks = {name: functools.partial(made.compile, module) for name, module in modules.items()}
    outcomes = run_isolated(tasks, limits, at_a_time)
    problems = {
        name: outcome.problem or f"returned {type(outcome.value).__name__}, not bytes"
        for name, outcome in outcomes.items()
        if not isinstance(outcome.value, bytes)
    }
    if problems:
        told = "; ".join(f"{name} ({_short(problem)})" for name, problem in problems.items())
        raise UserError(
            f"MLIR compiler '{compiler}' makes no binary of region {told}. Choose another compile.mlir.dialect or "
            "compile.mlir.compiler; compile.mlir.compiler=none writes the modules alone."
        )
    return outcomes


def _short(problem: str) -> str:
    problem = problem.removeprefix("CompileError: ")
    return problem if len(problem) <= 200 else f"{problem[:197]}…"
