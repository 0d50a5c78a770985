"""The train step without capture: plain autograd and torch.optim.AdamW on the same model.

It is the compiled step's independent twin (`compile.target=eager`) and shares no code with it but the update rules that
torch.optim lacks: the same interface, the same inputs, the same losses up to rounding. It needs no artifact, works with
any causal language model whose forward returns `.logits`, and is what to debug a model or a backend with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.training.config_schema import OptimizerConfig
from apps.training.distilling import divergence
from apps.training.eager_update import make_updates
from apps.training.parameter_groups import ParameterGroup, parameter_groups
from backends.errors import UserError
from backends.precision import BITS, PrecisionPolicy, as_torch
from backends.split_masters import split
from backends.state import CollectedState, collect_state, require_calibrated, set_first_row
from backends.stochastic_rounding import COLUMNS, key_of, round_to_bfloat16
from compiled.measuring import Measuring, Unmeasured
from compiled.reduction import OneWorker, Reducer


class StepResult(NamedTuple):
    """0-d tensors on the device: reading them waits for it. `grad_norm` is None when gradients are not clipped.

    `objective`: what was minimised, summed like the loss; None when it is the loss. `applied`: whether anything was
    updated; None for a step that cannot skip its update.
    """

    loss: Tensor
    grad_norm: Tensor | None
    objective: Tensor | None = None
    applied: Tensor | None = None


class EagerProgram:
    """Runs `model`'s train step eagerly and updates its parameters in place.

    The optimizer works on weights in the arithmetic's dtype (the widest of float32, parameters, masters and moments).
    Where the policy stores something narrower, the values are rounded through the stored dtype after each step: the
    numbers are those of narrow storage, the memory is not.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: PrecisionPolicy,
        groups: Sequence[ParameterGroup] | None = None,
        reducer: Reducer | None = None,
        stats_every: int | None = None,
        loss_terms: Mapping[str, float] | None = None,
        skips_nonfinite: bool = False,
        teacher: nn.Module | None = None,
    ) -> None:
        """`groups`: the rules of the parameters; None: the default optimizer's. `loss_terms`: of compiled.objective.

        `teacher`: a frozen model whose predictions are learned, as the terms say.
        """
        groups = parameter_groups(OptimizerConfig(), model) if groups is None else groups
        self.model, self.loss_terms, self.skips_nonfinite = model, loss_terms or {}, skips_nonfinite
        self.teacher = teacher
        self.reducer: Reducer = reducer or OneWorker()
        self.reducer.assign([sum(parameter.nbytes for parameter in model.parameters())])
        assert not self.reducer.shards, "the eager twin keeps its optimizer state whole"
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.logits_dtype = as_torch(precision.logits)
        self.moments_dtype = as_torch(precision.moments)
        self.has_masters = precision.master != "none"
        self.is_stochastic, self.splits = precision.rounding == "stochastic", precision.rounding == "split"
        widths = ["float32", precision.parameters, precision.moments]
        self.arithmetic = as_torch(
            max([*widths, precision.master] if self.has_masters else widths, key=BITS.__getitem__)
        )
        # What the optimizer updates: the parameters themselves, or wider copies of them.
        self.weights = {
            name: parameter if parameter.dtype == self.arithmetic else parameter.detach().to(self.arithmetic)
            for name, parameter in self.parameters.items()
        }
        self.updates = make_updates(groups, self.weights)
        self.measuring = Unmeasured()
        if stats_every is not None:
            device = next(model.parameters()).device
            self.measuring = Measuring(list(self.weights), self.weights, stats_every, device)
        self.row_of = {name: row for row, (name, _) in enumerate(model.named_parameters())}

    def train_step(
        self,
        microbatches: Sequence[Mapping[str, Tensor]],
        hyperparameters: Tensor,
        max_grad_norm: float | None,
        max_grad_value: float | None = None,
    ) -> StepResult:
        """One optimizer step over `microbatches` (input_ids, labels, grad_scale[, article_ids] on the device).

        `hyperparameters` as `hyperparameter_table` makes it, on the host.
        """
        self.model.train()
        self.measuring.start()
        loss, gradients, states = self._loss_and_gradients(microbatches)
        entropy, objective = loss if loss.ndim else (loss, None)
        grad_norm = applied = None
        if max_grad_norm is not None or self.skips_nonfinite:
            grad_norm = nn.utils.get_total_norm(gradients.values())
        if self.skips_nonfinite and grad_norm is not None:
            applied = torch.isfinite(loss).all() & torch.isfinite(grad_norm)
        bounded = grad_norm
        if max_grad_value is not None:
            gradients = {name: each.clamp(-max_grad_value, max_grad_value) for name, each in gradients.items()}
            bounded = None if max_grad_norm is None else nn.utils.get_total_norm(gradients.values())
        self.measuring.before_update(gradients)
        if applied is None or applied:
            if max_grad_norm is not None and bounded is not None:
                # not in place: equal gradients, of A and B where A + B is the weight, are one tensor
                factor = torch.clamp(max_grad_norm / (bounded + 1e-6), max=1.0)
                gradients = dict(zip(gradients, torch._foreach_mul(list(gradients.values()), factor), strict=True))
            self._update(gradients, hyperparameters)
            self._store_state(states)
        else:
            for update in self.updates:
                update.skip()
        self.measuring.after_update(gradients)
        self.measuring.finish(self.reducer)
        return StepResult(entropy, grad_norm, objective, applied)

    def _update(self, gradients: dict[str, Tensor], hyperparameters: Tensor) -> None:
        rows = {name: hyperparameters[row] for name, row in self.row_of.items()}
        for update in self.updates:
            update.step(gradients, rows)
        self._store(rows)

    def calibrate(self, microbatches: Sequence[Mapping[str, Tensor]]) -> None:
        """Forward passes of one step that let the backends see their ranges; nothing else changes."""
        self.model.train()
        with torch.no_grad():
            self._store_state([self._loss_and_state(microbatch)[1] for microbatch in microbatches])

    def evaluate(self, microbatch: Mapping[str, Tensor]) -> Tensor:
        """Σ grad_scale · CE of one microbatch, 0-d, without an update and with the model in evaluation mode."""
        require_calibrated(self.model)
        with torch.no_grad(), _evaluating(self.model):
            return self._loss_and_state(microbatch)[0]

    def gradients(self, microbatches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The step's summed gradients by parameter name, unclipped, without an update."""
        self.model.train()
        return self._loss_and_gradients(microbatches)[1]

    def optimizer_state(self) -> dict[str, Tensor]:
        """`<parameter>.<name>` → tensor: the state of its rule (torch counts steps in it), and the master if any.

        Of torch's optimizer nothing before the first step. The tensors are the live ones, not copies.
        """
        state = {
            f"{name}.{key}": value
            for update in self.updates
            for name, states in update.state.items()
            for key, value in states.items()
        }
        if self.has_masters:
            state |= {f"{name}.master": weight for name, weight in self.weights.items()}
        return state | self.measuring.state()

    @torch.no_grad()
    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `optimizer_state()` gave, so that the next step continues exactly; the model is loaded.

        UserError for a compiled step's state, which counts no steps and may keep masters otherwise.
        """
        try:
            self._load(tensors)
        except KeyError as missing:
            raise UserError(
                f"The optimizer's state has no {missing.args[0]}, which compile.target=eager keeps: it was saved by a "
                "compiled step. Load it with the compile.target it was saved with."
            ) from None

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            if self.has_masters:
                weight.copy_(tensors[f"{name}.master"])
            elif weight is not self.parameters[name]:
                weight.copy_(self.parameters[name])
        for update in self.updates:
            update.load(tensors)
        self.measuring.load_state(tensors)

    def _loss_and_state(self, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, CollectedState]:
        extra = {"article_ids": microbatch["article_ids"]} if "article_ids" in microbatch else {}
        set_first_row(self.model, microbatch.get("first_row", 0))
        with collect_state() as state:
            logits = self.model(input_ids=microbatch["input_ids"], use_cache=False, **extra).logits
        flat = logits.to(self.logits_dtype).flatten(0, 1)
        if self.measuring.measures and self.model.training:
            hits = flat.detach().argmax(-1) == microbatch["labels"].flatten()
            self.measuring.count_hits((microbatch["grad_scale"].flatten() * hits).sum())
        each = F.cross_entropy(flat, microbatch["labels"].flatten(), reduction="none")
        scale, terms = microbatch["grad_scale"].flatten(), self.loss_terms
        if not terms or not self.model.training:
            return (scale * each).sum(), state
        smoothing, penalty = terms.get("label_smoothing", 0.0), terms.get("z_loss", 0.0)
        smoothed = F.cross_entropy(flat, microbatch["labels"].flatten(), reduction="none", label_smoothing=smoothing)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(input_ids=microbatch["input_ids"], use_cache=False, **extra).logits
            taught, weight = taught.to(self.logits_dtype).flatten(0, 1), terms["distill_weight"]
            smoothed = (1 - weight) * smoothed + weight * divergence(flat, taught, terms["distill_temperature"])
        minimised = smoothed + penalty * flat.logsumexp(-1).square()
        return torch.stack([(scale * each).sum(), (scale * minimised).sum()]), state

    def _loss_and_gradients(
        self, microbatches: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor], list[CollectedState]]:
        losses, states = [], []
        total: dict[str, Tensor] = {}
        for microbatch in microbatches:
            self.measuring.enter("forward")
            loss, state = self._loss_and_state(microbatch)
            self.measuring.enter("backward")
            states.append(state)
            losses.append(loss.detach())
            minimised = loss[1] if loss.ndim else loss
            found = torch.autograd.grad(minimised, list(self.parameters.values()), materialize_grads=True)
            for name, gradient in zip(self.parameters, found, strict=True):
                wide = gradient.to(self.arithmetic)
                total[name] = total[name] + wide if name in total else wide
        self.measuring.enter("reduce")
        self.reducer.start(0, total)
        ((_, summed),) = self.reducer.finished(everything=True)
        return self.reducer.sum_(torch.stack(losses).sum(0)), summed, states

    @torch.no_grad()
    def _store_state(self, states: list[CollectedState]) -> None:
        """The state after a step: that of its microbatches and workers, combined as each buffer's spec says."""
        for layer, name in states[0]:
            kind = layer.state_specs[name].reduce
            parts = torch.stack([state[layer, name] for state in states]).double()
            if kind == "mean":
                ones = torch.ones((), dtype=parts.dtype, device=parts.device)
                value = self.reducer.sum_(parts.mean(0)) / self.reducer.sum_(ones)
            else:
                sign = 1 if kind == "max" else -1
                value = sign * self.reducer.max_((sign * parts).amax(0))
            layer.get_buffer(name).copy_(value)

    @torch.no_grad()
    def _store(self, rows: Mapping[str, Tensor]) -> None:
        """Write the wider copies back, rounding whatever the policy stores in a narrower dtype."""
        for name, parameter in self.parameters.items():
            weight = self.weights[name]
            if weight is not parameter:
                rounded = weight
                if self.is_stochastic:
                    rounded = round_to_bfloat16(weight, key_of(rows[name][-COLUMNS:]))
                elif self.splits:
                    rounded, _ = split(weight)
                parameter.copy_(rounded)
                if not self.has_masters:
                    weight.copy_(parameter)
        if self.moments_dtype != self.arithmetic:
            for update in self.updates:
                for value in update.moments():
                    value.copy_(value.to(self.moments_dtype))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
