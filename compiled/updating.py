"""The second half of a step: optimizer state, clipping, and the regions that update a group of parameters in place."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from backends.errors import UserError
from backends.split_masters import REST, Joined, join, split
from compiled.binding import Binding
from compiled.groups import has_pairs
from compiled.measuring import Measuring, Unmeasured
from compiled.reduction import Gradients, Reducer, addend


class Updater:
    """Optimizer state of the groups this worker owns, and their update.

    `moments_dtype` is that of the optimizer's state; `master_dtype` that of the wider copy of the weights which is
    updated (None: there is none). `stats_every`: steps from one that is measured to the next.
    """

    def __init__(
        self,
        binding: Binding,
        manifest: Mapping[str, Any],
        model: nn.Module,
        reducer: Reducer,
        *,
        moments_dtype: torch.dtype,
        master_dtype: torch.dtype | None,
        stats_every: int | None = None,
    ) -> None:
        self.binding, self.reducer = binding, reducer
        self.groups = manifest["schedule"]["updates"]
        self.splits = manifest["spec"]["precision"].get("rounding") == "split"
        parameters = dict(model.named_parameters())
        self.device = next(model.parameters()).device
        row_of = {name: row for row, name in enumerate(parameters)}
        self._rows = [self._row_index([row_of[full] for full in entry["parameters"].values()]) for entry in self.groups]
        self.adds_pairs = has_pairs(self.groups)
        reducer.assign([sum(parameters[full].nbytes for full in entry["parameters"].values()) for entry in self.groups])
        mine = [entry for index, entry in enumerate(self.groups) if reducer.owns(index)]
        shapes = {full: entry["state"][local] for entry in mine for local, full in entry["parameters"].items()}
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in parameters.items():
            if name in shapes:
                self.state[name] = {
                    state: torch.zeros(shape, dtype=moments_dtype, device=self.device)
                    for state, shape in shapes[name].items()
                }
                if self.splits:
                    self.state[name][REST] = torch.zeros(parameter.shape, dtype=torch.int16, device=self.device)
                elif master_dtype is not None:
                    self.state[name]["master"] = parameter.detach().to(master_dtype, copy=True)
        work = master_dtype or torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self.measuring = Unmeasured() if stats_every is None else self._measuring(model, stats_every)
        self.one = torch.ones((), dtype=work, device=self.device)
        # what rules sum over all of their parameters before an update; None: no rule does
        number = len(manifest["optimizer"]["totals"])
        self.totals = torch.zeros(number, dtype=work, device=self.device) if number else None

    def _row_index(self, rows: list[int]) -> slice | Tensor:
        """The rows of the hyper-parameter table that belong to a group: a slice where they lie side by side."""
        if not rows or rows == list(range(rows[0], rows[0] + len(rows))):
            return slice(rows[0], rows[0] + len(rows)) if rows else slice(0)
        return torch.tensor(rows, device=self.device)

    def _measuring(self, model: nn.Module, every: int) -> Measuring:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        weights: Mapping[str, Tensor] = {
            name: states.get("master", self.binding.tensors[name]) for name, states in self.state.items()
        }
        if self.splits:
            weights = Joined(weights, {name: states[REST] for name, states in self.state.items()})
        return Measuring(trained, weights, every, self.device)

    def update(
        self, group: int, gradients: Gradients, hyperparameters: Tensor, coefficient: Tensor, *, wide: bool
    ) -> None:
        """Update one group in place, and let the other workers have it.

        `wide`: gradients in at least float32, unless two come as they are.
        """
        entry = self.groups[group]
        is_pair = any(addend(name) in gradients for name in entry["parameters"].values())
        region = entry["paired" if is_pair else "summed" if wide else "direct"]
        if region is None:
            return
        if self.reducer.owns(group):
            inputs = self._inputs(group, gradients, hyperparameters, coefficient)
            self.measuring.before_update(gradients)
            self.binding.run(region, inputs if self.totals is None else inputs | {"totals": self.totals})
            self.measuring.after_update(gradients)
        self.reducer.publish(group, {full: self.binding.tensors[full] for full in entry["parameters"].values()})

    def total(
        self, gathered: Iterable[tuple[int, Gradients]], hyperparameters: Tensor, coefficient: Tensor, *, wide: bool
    ) -> None:
        """Sum over all groups and workers what this step's updates need, if anything; the gradients stay."""
        if self.totals is None:
            return
        self.totals = torch.zeros_like(self.totals)
        for group, gradients in gathered:
            regions = self.groups[group].get("totals")
            if regions is not None and self.reducer.owns(group):
                inputs = self._inputs(group, gradients, hyperparameters, coefficient)
                self.totals += self.binding.run(regions["summed" if wide else "direct"], inputs)["totals"]
        if self.reducer.shards:
            self.totals = self.reducer.sum_(self.totals)

    def _inputs(
        self, group: int, gradients: Gradients, hyperparameters: Tensor, coefficient: Tensor
    ) -> dict[str, Tensor]:
        inputs = {"hyperparameters": hyperparameters[self._rows[group]], "grad_coef": coefficient}
        for local, full in self.groups[group]["parameters"].items():
            inputs[local], inputs[f"grad_{local}"] = self.binding.tensors[full], gradients[full]
            inputs |= {f"{state}_{local}": tensor for state, tensor in self.state[full].items()}
            inputs |= {f"addend_{local}": gradients[addend(full)]} if addend(full) in gradients else {}
        return inputs

    def norm(self, gathered: Iterable[Gradients]) -> Tensor:
        """The global norm of all groups' gradients, 0-d, the same on every worker."""
        flat = [gradient for gradients in gathered for gradient in gradients.values()]
        norms = torch._foreach_norm(flat, 2, dtype=self.one.dtype) if flat else [torch.zeros_like(self.one)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        return self.reducer.sum_(norm.square()).sqrt() if self.reducer.shards else norm

    def clip(self, norm: Tensor, max_grad_norm: float | Tensor) -> Tensor:
        """The factor, at most 1, that brings gradients of that norm to `max_grad_norm`; as torch's clip_grad_norm_."""
        return torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0).to(self.one.dtype)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Every tensor of this worker's optimizer state as `<parameter>.<state>`; the live tensors, not copies."""
        state = {f"{name}.{state}": tensor for name, states in self.state.items() for state, tensor in states.items()}
        return state | self.measuring.state()

    @torch.no_grad()
    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a state saved by `optimizer_state` into place; `UserError` naming the first key that does not fit."""
        self.measuring.load_state(tensors)
        for key, target in self.optimizer_state().items():
            given = tensors.get(key)
            name, _, state = key.rpartition(".")
            if given is None and state == REST and (master := tensors.get(f"{name}.master")) is not None:
                weight, given = split(master.to(torch.float32))
                self.binding.tensors[name].copy_(weight)
            if given is None and state == "master" and (rest := tensors.get(f"{name}.{REST}")) is not None:
                given = join(self.binding.tensors[name].to(rest.device), rest)
            if given is None or given.shape != target.shape:
                shown = "nothing" if given is None else list(given.shape)
                raise UserError(
                    f"Optimizer state {key} should have shape {list(target.shape)}, got {shown}: "
                    "it belongs to another model. Load the state that was saved with this model."
                )
            target.copy_(given)
