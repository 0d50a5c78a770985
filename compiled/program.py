"""The step that runs: a schedule over regions. No graph is traced and nothing is compiled here.

forward    embed → block 0 … block L-1, keeping what each backward needs (with recompute: each block's input only)
head       a chunk of tokens at a time: loss, gradients of the hidden states, of the norm, of the projection
backward   block L-1 … block 0 → embed; as soon as a group's gradients are final they go to the sink
reduce     a group's gradients are summed over the workers while the blocks below run backward
update     a group at a time, in place

Without clipping a group is updated as soon as it is summed, so that gradients never all live together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compiled.artifact import Artifact
from compiled.binding import Binding
from compiled.reduction import Gradients, OneWorker, Reducer
from compiled.stages import StagedModel
from compiled.updating import Updater

Sink = Callable[[int, Gradients], None]  # (group, its gradients of this microbatch, final)


@dataclass(frozen=True)
class StepResult:
    """0-d tensors: Σ grad_scale · CE over microbatches and workers, and the gradients' global norm before clipping.

    The norm is None when gradients are not clipped.
    """

    loss: Tensor
    grad_norm: Tensor | None


class CompiledProgram:
    """Trains `model` in place through the regions of `artifact`.

    The model lies on the artifact's device in its final dtypes. `moments_dtype` and `master_dtype` as for `Updater`;
    `reducer` sums over the workers of the job.
    """

    def __init__(
        self,
        artifact: Artifact,
        model: nn.Module,
        *,
        moments_dtype: torch.dtype,
        master_dtype: torch.dtype | None,
        reducer: Reducer | None = None,
    ) -> None:
        self.binding = Binding(artifact, model)
        self.spec = artifact.spec
        schedule = artifact.manifest["schedule"]
        self.embed, self.blocks, self.head = schedule["embed"], schedule["blocks"], schedule["head"]
        self.model: StagedModel = model  # type: ignore[assignment]
        self.device = next(model.parameters()).device
        cos, sin = self.model.rotary_tables(self.spec["max_seq_length"], self.device)
        self.tables = {"cos": cos, "sin": sin}
        self.reducer: Reducer = reducer or OneWorker()
        self.updater = Updater(
            self.binding,
            artifact.manifest,
            model,
            self.reducer,
            moments_dtype=moments_dtype,
            master_dtype=master_dtype,
        )
        self.optimizer_state = self.updater.optimizer_state
        self.load_optimizer_state = self.updater.load_optimizer_state

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
        wide = len(microbatches) > 1 or self.reducer.widens

        def update(groups: Iterable[tuple[int, Gradients]], coefficient: Tensor) -> None:
            for group, gradients in groups:
                self.updater.update(group, gradients, hyper, coefficient, wide=wide)
                gradients.clear()

        def on_start() -> None:
            if max_grad_norm is None:
                update(self.reducer.finished(everything=False), self.updater.one)

        loss = self._sum_gradients(microbatches, on_start)
        norm, coefficient = None, self.updater.one
        summed = self.reducer.finished(everything=True)
        if max_grad_norm is not None:
            gathered = list(summed)
            norm = self.updater.norm(gradients for _, gradients in gathered)
            coefficient, summed = self.updater.clip(norm, max_grad_norm), iter(gathered)
        update(summed, coefficient)
        self.reducer.settle()
        return StepResult(self.reducer.sum_(loss), norm)

    @torch.no_grad()
    def gradients(self, microbatches: Sequence[Mapping[str, Tensor]]) -> Gradients:
        """Gradients of Σ grad_scale · CE over microbatches and workers, by parameter name; nothing is updated."""
        self._sum_gradients(microbatches, lambda: None, commit=False)
        groups = [gradients for _, gradients in self.reducer.finished(everything=True)]
        return {name: gradient for group in groups for name, gradient in group.items()}

    @torch.no_grad()
    def evaluate(self, microbatch: Mapping[str, Tensor]) -> Tensor:
        """Σ grad_scale · CE of one batch, 0-d. Parameters, optimizer state and backend statistics stay as they are."""
        run, shared = self.binding.run, self._shared(microbatch)
        ids = {"input_ids": microbatch["input_ids"]}
        hidden = run(self.embed["evaluate"], self.binding.inputs(self.embed) | ids)["output"]
        for block in self.blocks:
            hidden = run(block["evaluate"], self.binding.inputs(block) | shared | {"hidden_states": hidden})["output"]
        return _total([run(self.head["evaluate"], chunk)["loss"] for chunk in self._chunks(hidden, microbatch)])

    def _sum_gradients(
        self, microbatches: Sequence[Mapping[str, Tensor]], on_start: Callable[[], None], commit: bool = True
    ) -> Tensor:
        """Sweep over the microbatches; each group goes to the reducer when it is final, and `on_start` is called.

        Returns this worker's loss. Several microbatches are summed in at least float32.
        """
        gathered: dict[int, Gradients] = {}
        losses = []
        for number, microbatch in enumerate(microbatches, start=1):
            is_last = number == len(microbatches)

            def keep(group: int, gradients: Gradients, is_last: bool = is_last) -> None:
                if group in gathered:
                    torch._foreach_add_(list(gathered[group].values()), list(gradients.values()))
                elif not is_last:
                    gathered[group] = {name: gradient.to(_wide(gradient)) for name, gradient in gradients.items()}
                if is_last:
                    self.reducer.start(group, gathered.pop(group, gradients))
                    on_start()

            losses.append(self._sweep(microbatch, keep, commit))
        return _total(losses)

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
                gradient = gradients[full].to(_wide(gradient)).add_(gradient)
            gradients[full] = gradient

    def _shared(self, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.spec["article_attention"]:
            return self.tables
        return self.tables | {"mask": self.model.article_mask(microbatch["article_ids"])}


def _wide(gradient: Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)


def _total(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
