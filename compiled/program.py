"""The step that runs: a schedule over regions. No graph is traced and nothing is compiled here.

forward    embed → block 0 … block L-1, keeping what each backward needs (with recompute: each block's input only)
head       a chunk of tokens at a time: loss, gradients of the hidden states, of the norm, of the projection
backward   block L-1 … block 0 → embed; as soon as a group's gradients are final they go to the sink
update     a group at a time, in place

The sink makes the step: update at once (one microbatch, no clipping: gradients never all live together), or keep and
sum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backends.errors import UserError
from compiled.artifact import Artifact
from compiled.binding import Binding
from compiled.stages import StagedModel

Gradients = dict[str, Tensor]  # by the model's parameter name
Sink = Callable[[int, Gradients], None]  # (group, its gradients of this microbatch, final)


@dataclass(frozen=True)
class StepResult:
    """0-d tensors: Σ grad_scale · CE over the microbatches, and the gradients' global norm before clipping.

    The norm is None when gradients are not clipped.
    """

    loss: Tensor
    grad_norm: Tensor | None


class CompiledProgram:
    """Trains `model` in place through the regions of `artifact`.

    The model lies on the artifact's device in its final dtypes. `moments_dtype` is that of the optimizer's state;
    `master_dtype` that of the wider copy of the weights which is updated (None: there is none).
    """

    def __init__(
        self, artifact: Artifact, model: nn.Module, *, moments_dtype: torch.dtype, master_dtype: torch.dtype | None
    ) -> None:
        self.binding = Binding(artifact, model)
        self.spec = artifact.spec
        schedule = artifact.manifest["schedule"]
        self.embed, self.blocks, self.head = schedule["embed"], schedule["blocks"], schedule["head"]
        self.groups = schedule["updates"]
        self.model: StagedModel = model  # type: ignore[assignment]
        self.device = next(model.parameters()).device
        cos, sin = self.model.rotary_tables(self.spec["max_seq_length"], self.device)
        self.tables = {"cos": cos, "sin": sin}
        rows = {name: row for row, (name, _) in enumerate(model.named_parameters())}
        self._rows = [self._row_index([rows[full] for full in group["parameters"].values()]) for group in self.groups]
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                names = artifact.manifest["optimizer"]["state"]
                self.state[name] = {state: torch.zeros_like(parameter.detach(), dtype=moments_dtype) for state in names}
                if master_dtype is not None:
                    self.state[name]["master"] = parameter.detach().to(master_dtype, copy=True)
        work = master_dtype or torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self._one = torch.ones((), dtype=work, device=self.device)

    def _row_index(self, rows: list[int]) -> slice | Tensor:
        """The rows of the hyper-parameter table that belong to a group: a slice where they lie side by side."""
        if not rows or rows == list(range(rows[0], rows[0] + len(rows))):
            return slice(rows[0], rows[0] + len(rows)) if rows else slice(0)
        return torch.tensor(rows, device=self.device)

    # --- what a trainer calls -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def train_step(
        self,
        microbatches: Sequence[Mapping[str, Tensor]],
        hyperparameters: Tensor,
        max_grad_norm: float | Tensor | None,
    ) -> StepResult:
        """One optimizer step over the microbatches (input_ids, labels, grad_scale[, article_ids]: [B, S], on device).

        `hyperparameters` [parameters, hyper-parameters] has a row for each of `model.named_parameters()`, in order.
        """
        hyper = hyperparameters.to(self.device, non_blocking=True)
        if len(microbatches) == 1 and max_grad_norm is None:
            loss = self._sweep(microbatches[0], lambda group, grads: self._update(group, grads, hyper, self._one))
            return StepResult(loss, None)
        gathered, loss = self._gather(microbatches)
        norm, coefficient = None, self._one
        if max_grad_norm is not None:
            norm = self._norm(gathered)
            coefficient = torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0).to(self._one.dtype)
        for group, gradients in gathered.items():
            self._update(group, gradients, hyper, coefficient, summed=len(microbatches) > 1)
            gradients.clear()
        return StepResult(loss, norm)

    @torch.no_grad()
    def gradients(self, microbatches: Sequence[Mapping[str, Tensor]]) -> Gradients:
        """Gradients of Σ grad_scale · CE over the microbatches, by parameter name; nothing is updated."""
        gathered, _ = self._gather(microbatches, commit=False)
        return {name: gradient for group in gathered.values() for name, gradient in group.items()}

    @torch.no_grad()
    def evaluate(self, microbatch: Mapping[str, Tensor]) -> Tensor:
        """Σ grad_scale · CE of one batch, 0-d. Parameters, optimizer state and backend statistics stay as they are."""
        run, shared = self.binding.run, self._shared(microbatch)
        ids = {"input_ids": microbatch["input_ids"]}
        hidden = run(self.embed["evaluate"], self.binding.inputs(self.embed) | ids)["output"]
        for block in self.blocks:
            hidden = run(block["evaluate"], self.binding.inputs(block) | shared | {"hidden_states": hidden})["output"]
        return _total([run(self.head["evaluate"], chunk)["loss"] for chunk in self._chunks(hidden, microbatch)])

    def optimizer_state(self) -> dict[str, Tensor]:
        """Every tensor of the optimizer's state as `<parameter>.<state>`; the live tensors, not copies."""
        return {f"{name}.{state}": tensor for name, states in self.state.items() for state, tensor in states.items()}

    @torch.no_grad()
    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a state saved by `optimizer_state` into place; `UserError` naming the first key that does not fit."""
        for key, target in self.optimizer_state().items():
            if key not in tensors or tensors[key].shape != target.shape:
                given = list(tensors[key].shape) if key in tensors else "nothing"
                raise UserError(
                    f"Optimizer state {key} should have shape {list(target.shape)}, got {given}: "
                    "it belongs to another model. Load the state that was saved with this model."
                )
            target.copy_(tensors[key])

    # --- forward and backward -----------------------------------------------------------------------------------------

    def _sweep(self, microbatch: Mapping[str, Tensor], sink: Sink, commit: bool = True) -> Tensor:
        """Forward, head and backward of one microbatch; each group's gradients go to the sink when they are final."""
        run, shared = self.binding.run, self._shared(microbatch)
        embed_inputs = self.binding.inputs(self.embed) | {"input_ids": microbatch["input_ids"]}
        embedded = run(self.embed["forward"], embed_inputs)
        hidden = embedded["output"]
        recompute = self.spec["recompute"] == "block"
        stash, new_states = [], [(self.embed, self._new_state(self.embed, embedded))]
        for block in self.blocks:
            inputs = self.binding.inputs(block) | shared | {"hidden_states": hidden}
            outputs = run(block["forward"], inputs)
            hidden = outputs["output"]
            new_states.append((block, self._new_state(block, outputs)))
            stash.append((inputs, None if recompute else outputs))
        loss, grad, ends = self._head_step(hidden, microbatch, commit)
        for index in reversed(range(len(self.blocks))):
            block = self.blocks[index]
            inputs, kept = stash.pop()
            # state is committed after the sweep, so a recomputed forward reads what the first one read
            outputs = run(block["forward"], inputs) if kept is None else kept
            results = run(block["backward"], inputs | outputs | {"grad_output": grad})
            grad = results["grad_hidden_states"]
            sink(index, {block["parameters"][local]: results[f"grad_{local}"] for local in block["trained"]})
        self._embed_backward(embed_inputs | embedded, grad, ends)
        sink(len(self.blocks), ends)
        for entry, new_state in new_states if commit else ():
            self.binding.commit(entry, new_state)
        return loss

    @staticmethod
    def _new_state(entry: Mapping[str, Mapping[str, str]], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"new_{local}": outputs[f"new_{local}"] for local in entry["state"]}

    def _head_step(
        self, hidden: Tensor, microbatch: Mapping[str, Tensor], commit: bool
    ) -> tuple[Tensor, Tensor, Gradients]:
        """Loss, gradient of the hidden states, and the head's parameter gradients, summed over the chunks."""
        names = {local: self.head["parameters"][local] for local in self.head["trained"]}
        sums: Gradients = {}
        if self.head["chunks"] > 1:
            for local, full in names.items():
                dtype = self.binding.input_dtype(self.head["train"], f"sum_{local}")
                sums[f"sum_{local}"] = torch.zeros_like(self.binding.tensors[full], dtype=dtype)
        losses, grads, state = [], [], dict[str, Tensor]()
        results: dict[str, Tensor] = {}
        for chunk in self._chunks(hidden, microbatch):
            # a statistic of the projection's backend sees one chunk after another
            results = self.binding.run(self.head["train"], chunk | sums | state)
            state = {local: results[f"new_{local}"] for local in self.head["state"]}
            losses.append(results["loss"])
            grads.append(results["grad_hidden_states"])
        if commit:
            self.binding.commit(self.head, results)
        gradients = {full: sums[f"sum_{local}"] if sums else results[f"grad_{local}"] for local, full in names.items()}
        grad = grads[0] if len(grads) == 1 else torch.cat(grads)
        return _total(losses), grad.view(hidden.shape), gradients

    def _chunks(self, hidden: Tensor, microbatch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The head's inputs, a dict for each chunk of tokens."""
        rows = hidden.shape[0] * hidden.shape[1] // self.head["chunks"]
        parts = (hidden.view(-1, hidden.shape[-1]), microbatch["labels"].view(-1), microbatch["grad_scale"].view(-1))
        fixed = self.binding.inputs(self.head)
        return [
            fixed | {"hidden_states": states, "labels": labels, "grad_scale": scale}
            for states, labels, scale in zip(*(part.split(rows) for part in parts), strict=True)
        ]

    def _embed_backward(self, inputs: dict[str, Tensor], grad: Tensor, gradients: Gradients) -> None:
        """Add the embedding's gradients to `gradients`, where a tied weight already has the head's."""
        if not self.embed["trained"]:
            return
        results = self.binding.run(self.embed["backward"], inputs | {"grad_output": grad})
        for local in self.embed["trained"]:
            full, gradient = self.embed["parameters"][local], results[f"grad_{local}"]
            if full in gradients:
                gradient = gradients[full].to(torch.promote_types(gradient.dtype, torch.float32)).add_(gradient)
            gradients[full] = gradient

    def _shared(self, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.spec["article_attention"]:
            return self.tables
        return self.tables | {"mask": self.model.article_mask(microbatch["article_ids"])}

    # --- gradients and update -----------------------------------------------------------------------------------------

    def _gather(
        self, microbatches: Sequence[Mapping[str, Tensor]], commit: bool = True
    ) -> tuple[dict[int, Gradients], Tensor]:
        """Gradients by group and the loss, summed over the microbatches; several are summed in at least float32."""
        gathered: dict[int, Gradients] = {}

        def keep(group: int, gradients: Gradients) -> None:
            if group in gathered:
                torch._foreach_add_(list(gathered[group].values()), list(gradients.values()))
            elif len(microbatches) == 1:
                gathered[group] = gradients
            else:
                gathered[group] = {n: g.to(torch.promote_types(g.dtype, torch.float32)) for n, g in gradients.items()}

        losses = [self._sweep(microbatch, keep, commit) for microbatch in microbatches]
        return gathered, _total(losses)

    def _norm(self, gathered: Mapping[int, Gradients]) -> Tensor:
        flat = [gradient for gradients in gathered.values() for gradient in gradients.values()]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(flat, 2, dtype=self._one.dtype)))

    def _update(
        self, group: int, gradients: Gradients, hyperparameters: Tensor, coefficient: Tensor, summed: bool = False
    ) -> None:
        """Update one group's parameters, optimizer state and masters in place."""
        entry = self.groups[group]
        region = entry["summed" if summed else "direct"]
        if region is None:
            return
        inputs = {"hyperparameters": hyperparameters[self._rows[group]], "grad_coef": coefficient}
        for local, full in entry["parameters"].items():
            inputs[local], inputs[f"grad_{local}"] = self.binding.tensors[full], gradients[full]
            inputs |= {f"{state}_{local}": tensor for state, tensor in self.state[full].items()}
        self.binding.run(region, inputs)


def _total(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
