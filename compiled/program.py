"""The step that runs: a schedule over regions. No graph is traced and nothing is compiled here.

forward    embed → block 0 … block L-1, keeping what each backward needs (or, with recompute, only each block's input)
head       a chunk of tokens at a time: loss, gradient of the hidden states, gradients of norm and projection
backward   block L-1 … block 0 → embed; as soon as a group's gradients are final they go to the sink
update     a group at a time, in place

The sink is what makes the step: update at once (one microbatch, no clipping: gradients never all live together), or keep and sum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backends.errors import UserError

from .artifact import Artifact
from .regions import Region
from .stages import StagedModel

Gradients = dict[str, Tensor]  # by the model's parameter name
Sink = Callable[[int, Gradients], None]  # (group, its final gradients of this microbatch)


@dataclass(frozen=True)
class StepResult:
    """Loss (Σ grad_scale · CE over the microbatches, 0-d) and global gradient norm before clipping (0-d; None: not asked for)."""

    loss: Tensor
    grad_norm: Tensor | None


class CompiledProgram:
    """Trains `model` in place through the regions of `artifact`. The model lies on the artifact's device with final dtypes."""

    def __init__(self, artifact: Artifact, model: nn.Module, *, moments_dtype: torch.dtype, master_dtype: torch.dtype | None) -> None:
        manifest = artifact.manifest
        self.device_type = artifact.device_type
        self.regions = artifact.load_regions()
        self.tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self._check_parameters(manifest, model)
        self.spec = artifact.spec
        self.recompute = self.spec["recompute"] == "block"
        self._staged: StagedModel = model  # type: ignore[assignment]
        self.embed, self.blocks, self.head = (manifest["schedule"][part] for part in ("embed", "blocks", "head"))
        self.groups = manifest["schedule"]["updates"]
        device = next(model.parameters()).device
        cos, sin = self._staged.rotary_tables(self.spec["max_seq_length"], device)
        self.tables = {"cos": cos, "sin": sin}
        self.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._rows = {name: row for row, (name, _) in enumerate(model.named_parameters())}
        self.state = self._new_state(manifest["optimizer"]["state"], moments_dtype, master_dtype)
        self._checked: set[str] = set()
        work = master_dtype or torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self._one = torch.ones((), dtype=work, device=device)

    def _check_parameters(self, manifest: Mapping[str, Any], model: nn.Module) -> None:
        schedule = manifest["schedule"]
        entries = (schedule["embed"], schedule["head"], *schedule["blocks"])
        named = {name for entry in entries for slots in (entry["parameters"], entry["state"]) for name in slots.values()}
        absent = sorted(named - self.tensors.keys())
        strange = sorted(name for name, _ in model.named_parameters() if name not in named)
        if absent or strange:
            raise UserError(
                f"The artifact was made for a model with other parameters (missing here: {absent[:3]}, unknown to it: {strange[:3]}); "
                "compile again."
            )

    def _new_state(self, names: Sequence[str], moments: torch.dtype, master: torch.dtype | None) -> dict[str, dict[str, Tensor]]:
        state: dict[str, dict[str, Tensor]] = {}
        for parameter in self.trained:
            tensor = self.tensors[parameter].detach()
            state[parameter] = {name: torch.zeros_like(tensor, dtype=moments) for name in names}
            if master is not None:
                state[parameter]["master"] = tensor.to(master, copy=True)
        return state

    # --- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def train_step(
        self, microbatches: Sequence[Mapping[str, Tensor]], hyperparameters: Tensor, max_grad_norm: float | Tensor | None
    ) -> StepResult:
        """One optimizer step over the microbatches (input_ids, labels, grad_scale[, article_ids], each [B, S] on the device).

        `hyperparameters` [parameters, hyper-parameters] holds a row for each of `model.named_parameters()`, in that order.
        """
        if len(microbatches) == 1 and max_grad_norm is None:
            loss = self._sweep(microbatches[0], lambda group, gradients: self._update(group, gradients, hyperparameters, self._one, False))
            return StepResult(loss, None)
        gathered, loss = self._gather(microbatches)
        norm = None if max_grad_norm is None else self._norm(gathered)
        coefficient = self._one if norm is None else torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0).to(self._one.dtype)
        for group, gradients in gathered.items():
            self._update(group, gradients, hyperparameters, coefficient, len(microbatches) > 1)
            gradients.clear()
        return StepResult(loss, norm)

    @torch.no_grad()
    def gradients(self, microbatches: Sequence[Mapping[str, Tensor]]) -> Gradients:
        """Gradients of Σ grad_scale · CE over the microbatches, by parameter name; nothing is updated."""
        return {name: gradient for group in self._gather(microbatches)[0].values() for name, gradient in group.items()}

    @torch.no_grad()
    def evaluate(self, microbatch: Mapping[str, Tensor]) -> Tensor:
        """Σ grad_scale · CE of one batch, 0-d. Parameters, optimizer state and backend statistics stay as they are."""
        shared = self._shared(microbatch)
        hidden = self._run(self.embed["evaluate"], self._inputs(self.embed) | {"input_ids": microbatch["input_ids"]})["output"]
        for block in self.blocks:
            hidden = self._run(block["evaluate"], self._inputs(block) | {"hidden_states": hidden} | shared)["output"]
        losses = [self._run(self.head["evaluate"], chunk)["loss"] for chunk in self._head_chunks(hidden, microbatch)]
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    # --- forward and backward -----------------------------------------------------------------------------------------

    def _sweep(self, microbatch: Mapping[str, Tensor], sink: Sink) -> Tensor:
        """Forward, head and backward of one microbatch; hands each group's gradients to the sink when they are final."""
        shared = self._shared(microbatch)
        embed_inputs = self._inputs(self.embed) | {"input_ids": microbatch["input_ids"]}
        embedded = self._run(self.embed["forward"], embed_inputs)
        hidden, stash, updates = embedded["output"], [], [(self.embed, embedded)]
        for block in self.blocks:
            inputs = self._inputs(block) | {"hidden_states": hidden} | shared
            outputs = self._run(block["forward"], inputs)
            hidden = outputs["output"]
            updates.append((block, outputs))
            stash.append((inputs, None if self.recompute else outputs))
        loss, grad, head_gradients = self._head_step(hidden, microbatch)
        for index in reversed(range(len(self.blocks))):
            block = self.blocks[index]
            inputs, kept = stash.pop()
            # the statistics a recomputed forward reads are still the old ones: they are committed after the sweep
            outputs = kept if kept is not None else self._run(block["forward"], inputs)
            results = self._run(block["backward"], inputs | outputs | {"grad_output": grad})
            grad = results["grad_hidden_states"]
            sink(index, {block["parameters"][name]: results[f"grad_{name}"] for name in block["trained"]})
        self._embed_backward(embed_inputs | embedded, grad, head_gradients)
        sink(len(self.blocks), head_gradients)
        for entry, outputs in updates:
            self._commit(entry, outputs)
        return loss

    def _head_step(self, hidden: Tensor, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Gradients]:
        names = {local: self.head["parameters"][local] for local in self.head["trained"]}
        sums: Gradients = {}
        if self.head["chunks"] > 1:
            specs = {spec.name: spec for spec in self.regions[self.head["train"]].spec.inputs}
            sums = {
                f"sum_{local}": torch.zeros_like(self.tensors[full], dtype=getattr(torch, specs[f"sum_{local}"].dtype))
                for local, full in names.items()
            }
        losses, grads, results = [], [], {}
        for chunk in self._head_chunks(hidden, microbatch):
            results = self._run(self.head["train"], chunk | sums)
            losses.append(results["loss"])
            grads.append(results["grad_hidden_states"])
            self._commit(self.head, results)
        gradients = {full: sums[f"sum_{local}"] if sums else results[f"grad_{local}"] for local, full in names.items()}
        if len(losses) == 1:
            return losses[0], grads[0].view(hidden.shape), gradients
        return torch.stack(losses).sum(), torch.cat(grads).view(hidden.shape), gradients

    def _head_chunks(self, hidden: Tensor, microbatch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        rows = hidden.shape[0] * hidden.shape[1] // self.head["chunks"]
        fixed = self._inputs(self.head)
        parts = (hidden.view(-1, hidden.shape[-1]), microbatch["labels"].view(-1), microbatch["grad_scale"].view(-1))
        return [
            fixed | {"hidden_states": states, "labels": labels, "grad_scale": scale}
            for states, labels, scale in zip(*(part.split(rows) for part in parts), strict=True)
        ]

    def _embed_backward(self, inputs: dict[str, Tensor], grad: Tensor, gradients: Gradients) -> None:
        """Add the embedding's gradients to `gradients`; a tied weight already has the head's there."""
        if not self.embed["trained"]:
            return
        results = self._run(self.embed["backward"], inputs | {"grad_output": grad})
        for local in self.embed["trained"]:
            full, gradient = self.embed["parameters"][local], results[f"grad_{local}"]
            if full in gradients:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                gradient = gradients[full].to(wide).add_(gradient)
            gradients[full] = gradient

    # --- gradients and update -----------------------------------------------------------------------------------------

    def _gather(self, microbatches: Sequence[Mapping[str, Tensor]]) -> tuple[dict[int, Gradients], Tensor]:
        """Gradients by group and the loss, summed over the microbatches (in at least float32 when there are several)."""
        gathered: dict[int, Gradients] = {}

        def keep(group: int, gradients: Gradients) -> None:
            if group in gathered:
                torch._foreach_add_(list(gathered[group].values()), list(gradients.values()))
            elif len(microbatches) == 1:
                gathered[group] = gradients
            else:
                gathered[group] = {n: g.to(torch.promote_types(g.dtype, torch.float32)) for n, g in gradients.items()}

        losses = [self._sweep(microbatch, keep) for microbatch in microbatches]
        return gathered, torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _norm(self, gathered: Mapping[int, Gradients]) -> Tensor:
        flat = [gradient for gradients in gathered.values() for gradient in gradients.values()]
        norms = torch._foreach_norm(flat, 2, dtype=self._one.dtype)
        return torch.linalg.vector_norm(torch.stack(norms))

    def _update(self, group: int, gradients: Gradients, hyperparameters: Tensor, coefficient: Tensor, summed: bool) -> None:
        entry = self.groups[group]
        region = entry["summed" if summed else "direct"]
        if region is None:
            return
        rows = [self._rows[full] for full in entry["parameters"].values()]
        inputs = {"hyperparameters": self._hyper_rows(group, rows, hyperparameters), "grad_coef": coefficient}
        for local, full in entry["parameters"].items():
            inputs |= {local: self.tensors[full], f"grad_{local}": gradients[full]}
            inputs |= {f"{name}_{local}": tensor for name, tensor in self.state[full].items()}
        self._run(region, inputs)

    def _hyper_rows(self, group: int, rows: list[int], hyperparameters: Tensor) -> Tensor:
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return hyperparameters[rows[0] : rows[0] + len(rows)]
        return hyperparameters[rows]

    # --- regions ------------------------------------------------------------------------------------------------------

    def _run(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run region `name`, picking its inputs by name; the first run checks them against the manifest."""
        region: Region = self.regions[name]
        inputs = [tensors[spec.name] for spec in region.spec.inputs]
        if name not in self._checked:
            region.check(inputs, self.device_type)
            self._checked.add(name)
        outputs = region(inputs)
        return {spec.name: output for spec, output in zip(region.spec.outputs, outputs, strict=True)}

    def _inputs(self, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        return {local: self.tensors[full] for slots in ("parameters", "state") for local, full in entry[slots].items()}

    def _commit(self, entry: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> None:
        for local, full in entry["state"].items():
            self.tensors[full].copy_(outputs[f"new_{local}"])

    def _shared(self, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.spec["article_attention"]:
            return self.tables
        return self.tables | {"mask": self._staged.article_mask(microbatch["article_ids"])}

    # --- optimizer state ----------------------------------------------------------------------------------------------

    def optimizer_state(self) -> dict[str, Tensor]:
        """Every tensor of the optimizer's state as `<parameter>.<state name>`; the live tensors, not copies."""
        return {f"{parameter}.{name}": tensor for parameter, states in self.state.items() for name, tensor in states.items()}

    @torch.no_grad()
    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a state saved by `optimizer_state` into place; `UserError` naming the first key that is missing or differs."""
        for key, target in self.optimizer_state().items():
            if key not in tensors or tensors[key].shape != target.shape:
                given = list(tensors[key].shape) if key in tensors else "nothing"
                raise UserError(f"Optimizer state {key} should be {list(target.shape)}, got {given}: it belongs to another model.")
            target.copy_(tensors[key])
