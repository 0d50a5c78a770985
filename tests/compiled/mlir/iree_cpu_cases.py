"""What runs through IREE, each in a process of its own: a process that has made IREE's runtime must not fork again, as
pytest's may.

python iree_cpu_cases.py NAME [ARGUMENT …]     prints what function NAME returns, as JSON; its assertions are a test's
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiled.mlir.iree_cpu import IreeCompiler, _device, _lent, _taken
from compiled.mlir.loading import load_region
from compiled.regions import Region, RegionSpec, RunFunction, TensorSpec

# y = 2 x and b = a; the new x is x turned round and added to, so that every element is needed after another is written.
TURNING = """
#here = affine_map<(d0) -> (d0)>
module {
  func.func @step(%x: tensor<512xf32>, %a: tensor<f32>)
      -> (tensor<512xf32>, tensor<f32>, tensor<512xf32>, tensor<f32>) {
    %empty = tensor.empty() : tensor<512xf32>
    %y = linalg.generic {indexing_maps = [#here, #here], iterator_types = ["parallel"]}
        ins(%x : tensor<512xf32>) outs(%empty : tensor<512xf32>) {
      ^bb0(%value: f32, %_: f32):
        %twice = arith.addf %value, %value : f32
        linalg.yield %twice : f32
    } -> tensor<512xf32>
    %last = arith.constant 511 : index
    %new = linalg.generic {indexing_maps = [#here], iterator_types = ["parallel"]}
        outs(%empty : tensor<512xf32>) {
      ^bb0(%_: f32):
        %i = linalg.index 0 : index
        %j = arith.subi %last, %i : index
        %other = tensor.extract %x[%j] : tensor<512xf32>
        %own = tensor.extract %x[%i] : tensor<512xf32>
        %sum = arith.addf %other, %own : f32
        linalg.yield %sum : f32
    } -> tensor<512xf32>
    return %y, %a, %new, %a : tensor<512xf32>, tensor<f32>, tensor<512xf32>, tensor<f32>
  }
}
"""


def turning_region(module: str) -> RunFunction:
    """The region x, a → y, b that writes both x and a."""
    vector, number = torch.empty(512), torch.empty(())
    outputs = [TensorSpec.of("y", vector), TensorSpec.of("b", number)]
    spec = RegionSpec("step", [TensorSpec.of("x", vector), TensorSpec.of("a", number)], outputs, mutated=["x", "a"])
    compiler = IreeCompiler()
    return load_region(spec, compiler.compile(module.encode()), compiler)


def new_values() -> None:
    """What a region writes is made of what was given; a result that is an argument has memory of its own."""
    region = turning_region(TURNING)
    x, a = torch.randn(512), torch.tensor(3.0)
    for _ in range(3):
        before = x.clone()
        y, b = region([x, a])
        assert torch.equal(y, before + before)
        assert torch.equal(x, before.flip(0) + before)
        assert (float(a), float(b)) == (3.0, 3.0)
        assert len({tensor.data_ptr() for tensor in (x, y, a, b)}) == 4
        b.add_(1)
        assert float(a) == 3.0


def donating() -> bool:
    """Whether the new x is right when IREE is told to put it where x lies."""
    region = turning_region(TURNING.replace("%x: tensor<512xf32>", "%x: tensor<512xf32> {iree.abi.output = 2 : index}"))
    x = torch.randn(512)
    expected = x.flip(0) + x
    region([x, torch.tensor(3.0)])
    return torch.equal(x, expected)


def lending() -> None:
    """Every dtype goes to IREE and back in the same memory; memory that is not aligned is copied."""
    device = _device()
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool):
        given = torch.arange(30).reshape(5, 6).to(dtype)
        taken = _taken(device, _lent(device, given))
        assert taken.data_ptr() == given.data_ptr()
        assert taken.dtype == dtype
        assert torch.equal(taken, given)
    shifted = torch.arange(40.0)[3:33].view(5, 6)
    taken = _taken(device, _lent(device, shifted))
    assert taken.data_ptr() != shifted.data_ptr()
    assert torch.equal(taken, shifted)
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    assert _taken(device, _lent(device, parameter)).data_ptr() == parameter.data_ptr()


def outliving() -> None:
    """Results live on without their module, and until the interpreter is gone."""
    compiler = IreeCompiler()
    run = compiler.load(compiler.compile(TURNING.encode()))
    global kept  # until after IREE's own objects are gone
    kept = run([torch.ones(512), torch.tensor(2.0)])
    del run
    kept[0].add_(1)
    assert kept[0].tolist() == [3.0] * 512


def steps(artifact: str, count: str, *settings: str) -> dict[str, Any]:
    """`count` steps through the artifact beside the eager twin: the worst relative differences."""
    from apps.training.config import parse
    from apps.training.eager_program import EagerProgram
    from apps.training.step_plan import plan_step
    from compiled.artifact import open_artifact
    from tests.compiled.conftest import Compiled

    plan = plan_step(parse(list(settings)))
    rules = [json.loads(each.partition("=")[2]) for each in settings if each.startswith("backend.rules=")]
    compiled = Compiled(plan, open_artifact(Path(artifact)), *rules)
    ours, theirs = compiled.model(), compiled.model()
    program = compiled.program(ours)
    watch(program.binding.regions)
    twin = EagerProgram(theirs, groups=plan.groups, precision=plan.precision)
    losses, norms = [], []
    for step in range(1, int(count) + 1):
        batches = [compiled.batch(step, 0.8)]
        hyper = compiled.hyperparameters(ours, step)
        found, expected = program.train_step(batches, hyper, 0.5), twin.train_step(batches, hyper, 0.5)
        losses.append(relative(found.loss, expected.loss))
        norms.append(relative(found.grad_norm, expected.grad_norm))
    last = compiled.batch(0)
    return {
        "loss": max(losses),
        "norm": max(norms),
        "evaluation": relative(program.evaluate(last), twin.evaluate(last)),
        "parameters": max(
            float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
        ),
    }


def whole_step(artifact: str, count: str, *settings: str) -> dict[str, Any]:
    """`count` steps through the artifact's one module of the whole step, its new values given back to it by name."""
    from apps.training.config import parse
    from apps.training.eager_program import EagerProgram
    from apps.training.step_plan import plan_step
    from compiled.artifact import open_artifact, read_member
    from compiled.mlir.modules import ModuleSpec
    from tests.compiled.conftest import Compiled

    opened, plan = open_artifact(Path(artifact)), plan_step(parse(list(settings)))
    module = ModuleSpec.from_json(opened.manifest["mlir"]["modules"]["step"])
    compiler = IreeCompiler()
    run = compiler.load(compiler.compile(read_member(opened, module.file)))
    compiled = Compiled(plan, opened, [])
    model, theirs = compiled.model(), compiled.model()
    twin = EagerProgram(theirs, groups=plan.groups, precision=plan.precision)
    cos, sin = model.rotary_tables(plan.spec.max_seq_length, torch.device("cpu"))
    given = {each.name: torch.zeros(each.shape, dtype=getattr(torch, each.dtype)) for each in module.arguments}
    given |= {name: each.detach().clone() for name, each in model.named_parameters()} | {"cos": cos, "sin": sin}
    worst = {"loss": 0.0, "norm": 0.0}
    for step in range(1, int(count) + 1):
        batch, hyper = compiled.batch(step, 0.8), compiled.hyperparameters(model, step)
        given |= batch | {"hyperparameters": hyper, "max_grad_norm": torch.tensor(0.5)}
        results = run([given[each.name] for each in module.arguments])
        for argument, result in module.donations:
            given[module.arguments[argument].name] = results[result]
        expected = twin.train_step([batch], hyper, 0.5)
        named = {each.name: result for each, result in zip(module.results, results, strict=True)}
        worst["loss"] = max(worst["loss"], relative(named["loss"], expected.loss))
        worst["norm"] = max(worst["norm"], relative(named["grad_norm"], expected.grad_norm))
    weights = [(given[name], each.detach()) for name, each in theirs.named_parameters()]
    return worst | {"parameters": max(float((a - b).norm() / b.norm()) for a, b in weights)}


def watch(regions: dict[str, Region]) -> None:
    """Fail where a module itself writes an argument, which only `load_region` is to do."""
    for region in regions.values():
        region.run = functools.partial(_watched, region.run, region.spec)


def _watched(run: RunFunction, spec: RegionSpec, tensors: list[Tensor]) -> Any:
    kept = [each for each, described in zip(tensors, spec.inputs, strict=True) if described.name not in spec.mutated]
    before = [tensor.detach().clone() for tensor in kept]
    outputs = run(tensors)
    assert all(torch.equal(now, then) for now, then in zip(kept, before, strict=True)), spec.name
    return outputs


def relative(found: Tensor, expected: Tensor) -> float:
    return abs(float(found.detach()) - float(expected.detach())) / abs(float(expected.detach()))


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
