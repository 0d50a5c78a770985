"""What `compile.target=mlir` puts into the artifact: the modules, and the manifest's part about them."""

import hashlib
import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compiled.capture import Captured
from compiled.mlir.binaries import compile_modules
from compiled.mlir.extra import require_extra
from compiled.mlir.isolation import Outcome
from compiled.mlir.lowering import MlirOptions, lower_regions, lower_whole
from compiled.mlir.modules import ModuleSpec, module_of, roles_of
from compiled.mlir.whole_step import WholeStep
from compiled.parallel import Report
from compiled.regions import RegionSpec, TensorSpec
from compiled.schedule import Schedule
from compiled.spawned import compile_threads

FOLDER = "mlir"


def module_files(
    regions: Mapping[str, Captured],
    schedule: Schedule,
    options: MlirOptions,
    workers: int | None,
    report: Report,
    whole: WholeStep | None = None,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Members by name, and the manifest's `mlir`: dialect, versions, modules. Fills in the regions' specs.

    `whole`: the step that is to be a module of its own, beside the regions.
    """
    require_extra("torch_mlir")
    jobs = min(workers or compile_threads(), len(regions))
    done = 0

    def finished(name: str, outcome: Outcome) -> None:
        nonlocal done
        done += 1
        regions[name].spec.seconds = outcome.seconds
        report(regions[name].spec, done, len(regions))

    outcomes = lower_regions(regions, options.dialect, options.limits, jobs, finished)
    roles = roles_of(schedule)
    files: dict[str, bytes] = {}
    modules = {}
    for name, captured in regions.items():
        module = module_of(captured.spec, roles.get(name, {}))
        files |= _stored(module, outcomes[name])
        _describe(captured.spec, module)
        modules[name] = module.to_json()
    files |= _binaries(regions, outcomes, options, jobs)
    if whole is not None:
        module = whole.arguments.module()
        files |= _stored(module, lower_whole(whole, options.dialect, options.limits))
        modules[module.name] = module.to_json()
    versions = {"torch-mlir": importlib.metadata.version("torch-mlir")}
    return files, {"dialect": options.dialect, "versions": versions, "modules": modules}


def _binaries(
    regions: Mapping[str, Captured], outcomes: Mapping[str, Outcome], options: MlirOptions, jobs: int
) -> dict[str, bytes]:
    """What the compiler made of the modules, if there is one: the members that a run loads, noted in the specs."""
    if options.compiler is None:
        return {}
    compiled = compile_modules(
        {name: outcome.value for name, outcome in outcomes.items()}, options.compiler, options.limits, jobs
    )
    files = {}
    for name, outcome in compiled.items():
        spec = regions[name].spec
        spec.file, spec.sha256 = f"regions/{name}", hashlib.sha256(outcome.value).hexdigest()
        spec.seconds = round(spec.seconds + outcome.seconds, 2)
        files[spec.file] = outcome.value
    return files


def _describe(spec: RegionSpec, module: ModuleSpec) -> None:
    """A module's tensors lie in memory row by row, whatever strides the trace saw."""
    spec.file, spec.sha256 = module.file, module.sha256
    spec.inputs, spec.outputs = [[_row_major(each) for each in side] for side in (spec.inputs, spec.outputs)]


def _row_major(tensor: TensorSpec) -> TensorSpec:
    stride = tuple(math.prod(tensor.shape[index + 1 :]) for index in range(len(tensor.shape)))
    return replace(tensor, stride=stride)


def _stored(module: ModuleSpec, outcome: Outcome) -> dict[str, bytes]:
    """The module's text as a member of the artifact, with what the manifest says of it filled in."""
    content: bytes = outcome.value
    module.file = f"{FOLDER}/{module.name}.mlir"
    module.sha256 = hashlib.sha256(content).hexdigest()
    module.bytes, module.seconds = len(content), outcome.seconds
    return {module.file: content}
