"""A block's layers one stage after another, the dense model's block beside them: compress.targets=dense.

Layers with one input make a stage. A stage is asked for when the stages before it are compressed already, so that its
moments say what they did. Both streams stop at the stage's input; only its moments are held.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backends.errors import UserError
from modelzoo.compression.moments import Moments, TargetMoments
from modelzoo.compression.streaming import BlockInputs, version_of

Sum = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """Names of layers with one input, and where what each of them is added to can be seen.

    `taps`: for a layer that adds to the residual stream, the part of the block that is given the stream before it (""
    is the block itself).
    """

    names: list[str]
    taps: dict[str, str]


class DenseBeside:
    """The calibration data in front of a block, as the dense model gives it and as the compressed one does."""

    def __init__(self, own: BlockInputs, features: Mapping[str, int], sum_: Sum) -> None:
        """`features`: the width of each layer's input. UserError where a layer has no fewer of them than tokens."""
        _require_tokens(own, features, sum_)
        self.own, self.dense = own, own.copy()

    def targets(
        self, path: str, block: nn.Module, layers: Mapping[str, nn.Linear], sum_: Sum
    ) -> Iterator[tuple[str, TargetMoments]]:
        """Each layer's name and moments, in the order of computation; then both are advanced.

        Whoever takes one compresses the layer in `block` before taking the next. UserError naming a layer that is given
        nothing, or numbers that are not finite.
        """
        dense = copy.deepcopy(block)
        for stage in stages_of(self.own, path, block, layers):
            found = self._moments(path, block, dense, stage, {name: layers[name] for name in stage.names})
            sum_moments(found[stage.names[0]].own, sum_)
            for name in stage.names:
                each = found[name]
                each.total, each.squared, each.product = sum_(each.total), sum_(each.squared), sum_(each.product)
                _check(name, each)
            yield from found.items()
        self.dense.advance(path, dense)
        self.own.advance(path, block)

    def _moments(
        self, path: str, block: nn.Module, dense: nn.Module, stage: Stage, layers: Mapping[str, nn.Linear]
    ) -> dict[str, TargetMoments]:
        first = layers[stage.names[0]]
        own = Moments.empty(first.in_features, first.weight.device)
        found = {name: TargetMoments.empty(own, layer.out_features) for name, layer in layers.items()}
        tap = next(iter(stage.taps.values()), "")  # the layers of a stage that add, add to one stream
        inside = stage.names[0].removeprefix(f"{path}.")
        streams = [
            stream.until(path, part, part.get_submodule(inside), part.get_submodule(tap) if tap else None)
            for stream, part in ((self.dense, dense), (self.own, block))
        ]
        for (x, before), (x_own, before_own) in zip(*streams, strict=True):
            own.add(x_own)
            wide = torch.promote_types(x.dtype, torch.float32) if x.is_cuda else torch.float64
            drift = x.to(wide) - x_own.to(wide)
            for name, layer in layers.items():
                wanted = drift @ layer.weight.detach().to(wide).t()
                if name in stage.taps:
                    wanted += before.to(wide) - before_own.to(wide)
                found[name].add(x_own, wanted)
        return found


def stages_of(inputs: BlockInputs, path: str, block: nn.Module, layers: Mapping[str, nn.Linear]) -> list[Stage]:
    """Stages of `layers` in the order in which the block computes them, from one batch.

    A layer adds to the residual stream when some part of the block, or what follows it, is given its output plus what
    an earlier part was given.
    """
    given: list[tuple[str, Tensor]] = [("", inputs.hidden_states[0])]
    outputs: dict[str, tuple[Tensor, int]] = {}  # and how many of `given` were there before
    stages: list[tuple[Tensor, int, Stage]] = []  # and the version of the tensor

    def reach(name: str, x: Tensor) -> None:
        now = version_of(x)
        stage = next((stage for tensor, version, stage in stages if tensor is x and version == now), None)
        if stage is None:
            stages.append((x, now, Stage([name], {})))
        else:
            stage.names.append(name)

    def see(inside: str, arguments: Sequence[object]) -> None:
        if inside and arguments and isinstance(arguments[0], Tensor):
            given.append((inside, arguments[0]))

    handles = [
        part.register_forward_pre_hook(lambda part, arguments, inside=inside: see(inside, arguments))
        for inside, part in block.named_modules()
    ]
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(lambda layer, arguments, name=name: reach(name, arguments[0])))
        handles.append(
            layer.register_forward_hook(lambda layer, _, y, name=name: outputs.update({name: (y, len(given))}))
        )
    try:
        end = next(inputs.outputs(path, block))
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in outputs:
            raise UserError(f"Layer '{name}' was given nothing by the calibration data. Leave it out.")
    sums = [*(tensor for _, tensor in given), end]
    for *_, stage in stages:
        for name in stage.names:
            output, earlier = outputs[name]
            tap = _tap(output, given[:earlier], sums)
            if tap is not None:
                stage.taps[name] = tap
    return [stage for *_, stage in stages]


def _tap(output: Tensor, given: Sequence[tuple[str, Tensor]], sums: Sequence[Tensor]) -> str | None:
    """The part that is given what `output` is added to, if it is: of several that come near, the nearest.

    In 16 bits a small output hardly shows in a sum, and one of two sums is near to the other: a difference has to be
    small against the output too.
    """
    size, found = float(output.norm()), dict[str, float]()
    for path, before in given:
        if before.shape != output.shape:
            continue
        added = before + output
        near = min(4 * torch.finfo(added.dtype).eps * float(added.norm()), size / 4)
        others = [each for each in sums if each is not before and each.shape == added.shape]
        difference = min((float((each - added).norm()) for each in others), default=math.inf)
        if difference <= near:
            found.setdefault(path, difference)
    return min(found, key=lambda path: found[path], default=None)


def add_up(moments: Mapping[str, Moments], sum_: Sum) -> None:
    """Sum over the workers, each object once."""
    for each in {id(one): one for one in moments.values()}.values():
        sum_moments(each, sum_)


def sum_moments(moments: Moments, sum_: Sum) -> None:
    """Make them those of all workers together."""
    count = torch.tensor(moments.count, dtype=torch.int64, device=moments.total.device)
    moments.count = int(sum_(count))
    moments.total, moments.magnitude = sum_(moments.total), sum_(moments.magnitude)
    moments.second = sum_(moments.second)


def _check(name: str, targets: TargetMoments) -> None:
    if not bool(torch.isfinite(targets.own.second).all() and torch.isfinite(targets.product).all()):
        raise UserError(
            f"The inputs of layer '{name}' are not finite on the calibration data. Compress a model that computes "
            "them, perhaps in float32."
        )


def _require_tokens(inputs: BlockInputs, features: Mapping[str, int], sum_: Sum) -> None:
    # before the first layer is replaced; all of them are given each token once
    mine = sum(each[..., 0].numel() for each in inputs.hidden_states)
    tokens = int(sum_(torch.tensor(mine, device=inputs.hidden_states[0].device)))
    widest = max(features, key=lambda name: features[name])
    if tokens <= features[widest]:
        raise UserError(
            f"targets=dense fits layer '{widest}' of {features[widest]} features to {tokens} tokens. Expected more "
            "tokens than features, better 20 times as many: give more, or use targets=own."
        )
