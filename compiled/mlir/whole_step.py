"""The whole step as one pure function of named tensors: what the program does over regions, with one microbatch.

    forward → head, a chunk of tokens at a time → backward → gradients' norm and clipping → update of every group

Weights, moments, masters and backends' state go in and come out; nothing is inside. Unlike the regions it grows with
the depth. Clipping is by global norm alone (`max_grad_norm` infinite: none), and nothing is recomputed: whether an
activation is kept is for the compiler of a module this large to decide.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compiled.capture import Captured
from compiled.mlir.whole_step_arguments import StepArguments
from compiled.schedule import Schedule

Named = dict[str, Tensor]
Entry = Mapping[str, Any]
_MERGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"min": torch.minimum, "max": torch.maximum, "mean": torch.add}


class WholeStep:
    """The step over the tensors that `arguments` names, as a function of them in that order."""

    def __init__(
        self, regions: Mapping[str, Captured], schedule: Schedule, arguments: StepArguments, *, skips: bool
    ) -> None:
        self.regions, self.schedule, self.arguments, self.skips = regions, schedule, arguments, skips

    def __call__(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """The results by the names of `arguments.results`, in their order."""
        named = dict(zip(self.arguments.names, flat, strict=True))
        new_state: dict[str, list[Tensor]] = {}
        loss, gradients = self._gradients(named, new_state)
        norm, coefficient, applied = self._clip(named, loss, gradients)
        results = {"loss": loss, "grad_norm": norm} | self._update(named, gradients, coefficient)
        for full, value in self._merged(new_state).items():
            results[f"new_{full}"] = value if applied is None else torch.where(applied, value, named[full])
        return tuple(results[name] for name in self.arguments.results)

    def run(self, name: str, tensors: Mapping[str, Tensor]) -> Named:
        """One region: its outputs, and as `new_NAME` what it writes in place."""
        spec = self.regions[name].spec
        values = {
            each.name: tensors[each.name].clone() if each.name in spec.mutated else tensors[each.name]
            for each in spec.inputs
        }
        outputs = self.regions[name].graph(*values.values())
        results = {each.name: output for each, output in zip(spec.outputs, outputs, strict=True)}
        return results | {f"new_{written}": values[written] for written in spec.mutated}

    # ---- gradients -----------------------------------------------------------------------------------------------

    def _gradients(self, named: Named, new_state: dict[str, list[Tensor]]) -> tuple[Tensor, Named]:
        """The loss, and the gradient of every trained parameter by its full name."""
        schedule = self.schedule
        stash: list[Named] = []
        flowing = {"input_ids": named["input_ids"]}
        for entry in (schedule.embed, *schedule.blocks):
            inputs = named | _own(entry, named) | flowing
            outputs = self.run(entry["forward"], inputs)
            flowing = {"hidden_states": outputs["output"]}
            _add_state(entry, outputs, new_state)
            stash.append(inputs | outputs)
        loss, grad, gradients = self._head(named, flowing["hidden_states"], new_state)
        for entry in reversed(schedule.blocks):
            results = self.run(entry["backward"], stash.pop() | {"grad_output": grad})
            grad = results["grad_hidden_states"]
            gradients |= {entry["parameters"][local]: results[f"grad_{local}"] for local in entry["trained"]}
        embed = schedule.embed
        if embed["trained"]:
            results = self.run(embed["backward"], stash.pop() | {"grad_output": grad})
            for local in embed["trained"]:
                full, gradient = embed["parameters"][local], results[f"grad_{local}"]
                if full in gradients:  # a tied weight
                    gradient = gradients[full].to(torch.promote_types(gradient.dtype, torch.float32)) + gradient
                gradients[full] = gradient
        return loss, gradients

    def _head(self, named: Named, hidden: Tensor, new_state: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor, Named]:
        """Loss, gradient of the hidden states, the head's gradients: summed over the chunks."""
        head, region = self.schedule.head, self.regions[self.schedule.head["train"]].spec
        rows = hidden.shape[0] * hidden.shape[1] // head["chunks"]
        sums = {
            each.name: torch.zeros(each.shape, dtype=getattr(torch, each.dtype))
            for each in region.inputs
            if each.name.startswith("sum_")
        }
        parts = (hidden.reshape(-1, hidden.shape[-1]), named["labels"].reshape(-1), named["grad_scale"].reshape(-1))
        losses, grads = [], []
        results: Named = {}
        for index in range(head["chunks"]):
            chunk = [part.narrow(0, index * rows, rows) for part in parts]
            given = dict(zip(("hidden_states", "labels", "grad_scale"), chunk, strict=True))
            if head["given"]:  # the head's rows are tokens
                given["first_row"] = named["first_row"] * hidden.shape[1] + index * rows
            results = self.run(head["train"], named | _own(head, named) | given | sums)
            sums = {name: results[f"new_{name}"] for name in sums}
            _add_state(head, results, new_state)
            losses.append(results["loss"])
            grads.append(results["grad_hidden_states"])
        gradients = {
            head["parameters"][local]: sums[f"sum_{local}"] if sums else results[f"grad_{local}"]
            for local in head["trained"]
        }
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)
        grad = grads[0] if len(grads) == 1 else torch.cat(grads)
        return loss, grad.reshape(hidden.shape), gradients

    def _merged(self, new_state: Mapping[str, list[Tensor]]) -> Named:
        """One value of those that several chunks returned, as the state's `reduce` says."""
        merged = {}
        for entry in (self.schedule.embed, *self.schedule.blocks, self.schedule.head):
            for local, reduce in entry["reduce"].items():
                first, *others = new_state[entry["state"][local]]
                for other in others:
                    first = _MERGE[reduce](first, other)
                merged[entry["state"][local]] = first / (len(others) + 1) if reduce == "mean" and others else first
        return merged

    # ---- update --------------------------------------------------------------------------------------------------

    def _clip(self, named: Named, loss: Tensor, gradients: Named) -> tuple[Tensor, Tensor, Tensor | None]:
        """Global norm, the factor for it (as torch's clip_grad_norm_), and whether the update takes place."""
        limit = named["max_grad_norm"]
        squares = [gradient.to(limit.dtype).square().sum() for gradient in gradients.values()]
        norm = torch.stack(squares).sum().sqrt()
        coefficient = torch.clamp(limit / (norm + 1e-6), max=1.0)
        if not self.skips:
            return norm, coefficient, None
        applied = torch.isfinite(loss).all() & torch.isfinite(norm)
        return norm, torch.where(applied, coefficient, math.nan), applied

    def _update(self, named: Named, gradients: Named, coefficient: Tensor) -> Named:
        """New parameters and optimizer state by the names of the results."""
        given = [self._group_inputs(group, named, gradients, coefficient) for group in self.schedule.updates]
        totals = {}
        shares = [
            self.run(group["totals"]["direct"], inputs)["totals"]
            for group, inputs in zip(self.schedule.updates, given, strict=True)
            if group.get("totals")
        ]
        if shares:
            totals["totals"] = torch.stack(shares).sum(0)
        results: Named = {}
        for group, inputs in zip(self.schedule.updates, given, strict=True):
            if group["direct"] is None:
                continue
            updated = self.run(group["direct"], inputs | totals)
            for local, full in group["parameters"].items():
                results[f"new_{full}"] = updated[f"new_{local}"]
                for state in self.arguments.states_of(group, local):
                    results[f"new_{state}.{full}"] = updated[f"new_{state}_{local}"]
        return results

    def _group_inputs(self, group: Entry, named: Named, gradients: Named, coefficient: Tensor) -> Named:
        rows = [named["hyperparameters"][self.arguments.row_of[full]] for full in group["parameters"].values()]
        inputs = {"grad_coef": coefficient}
        if rows:
            inputs["hyperparameters"] = torch.stack(rows)
        for local, full in group["parameters"].items():
            inputs[local], inputs[f"grad_{local}"] = named[full], gradients[full]
            for state in self.arguments.states_of(group, local):
                inputs[f"{state}_{local}"] = named[f"{state}.{full}"]
        return inputs


def _own(entry: Entry, named: Named) -> Named:
    """Parameters and state of a part, by local name."""
    return {local: named[full] for slots in ("parameters", "state") for local, full in entry[slots].items()}


def _add_state(entry: Entry, outputs: Named, new_state: dict[str, list[Tensor]]) -> None:
    for local in entry["reduce"]:
        new_state.setdefault(entry["state"][local], []).append(outputs[f"new_{local}"])
