"""The step that runs: a schedule over regions. No graph is traced and nothing is compiled here.

forward    embed → block 0 … block L-1, keeping what each backward needs (of `recomputed` blocks: their input only)
head       a chunk of tokens at a time: loss, gradients of the hidden states, of the norm, of the projection
backward   block L-1 … block 0 → embed; as soon as a group's gradients are final they go to the sink: the head's first
reduce     a group's gradients are summed over the workers while the blocks below run backward
update     a group at a time, in place

A group is updated as soon as it is summed, unless clipping or a rule that sums over all groups needs all gradients.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from backends.articles import article_spans
from backends.state import require_calibrated
from compiled.accumulation import Accumulation, accumulation_dtype, total
from compiled.artifact import Artifact
from compiled.binding import Binding
from compiled.clipping import Verdict, clip_values, judge
from compiled.reduction import Gradients, OneWorker, Reducer
from compiled.stages import StagedModel
from compiled.statistics import Statistics
from compiled.step_result import StepResult
from compiled.teacher import Teacher
from compiled.updating import Updater

# a part's inputs, and its outputs unless they are computed again
Kept = tuple[dict[str, Tensor], dict[str, Tensor] | None]
Sink = Callable[[int, Gradients], None]  # (group, its gradients of this microbatch, final)


class CompiledProgram:
    """Trains `model` in place through the regions of `artifact`.

    The model lies on the artifact's device in its final dtypes. `moments_dtype` and `master_dtype` as for `Updater`;
    `reducer` sums over the workers of the job. `loss_terms`: the numbers of the artifact's terms (see objective.py).
    `stats_every`: steps from one that is measured to the next. `teacher`: the model of the artifact's teacher.
    `recomputed`: of so many blocks, the first, activations are computed again before their backward.
    """

    def __init__(
        self,
        artifact: Artifact,
        model: nn.Module,
        *,
        moments_dtype: torch.dtype,
        master_dtype: torch.dtype | None,
        reducer: Reducer | None = None,
        loss_terms: Mapping[str, float] | None = None,
        stats_every: int | None = None,
        teacher: nn.Module | None = None,
        recomputed: int = 0,
    ) -> None:
        self.binding = Binding(artifact, model)
        self.spec, self.recomputed = artifact.spec, recomputed
        schedule = artifact.manifest["schedule"]
        self.embed, self.blocks, self.head = schedule["embed"], schedule["blocks"], schedule["head"]
        self.head_group, self.embed_group = len(self.blocks), len(self.blocks) + 1  # behind those of the blocks
        self.model: StagedModel = model  # type: ignore[assignment]
        self.device = next(model.parameters()).device
        cos, sin = self.model.rotary_tables(self.spec["max_seq_length"], self.device)
        # a microbatch that does not say where its rows lie in the step has them at the start
        self.tables = {"cos": cos, "sin": sin, "first_row": torch.zeros((), dtype=torch.int64, device=self.device)}
        dtype = self.binding.input_dtype(self.head["train"], "grad_scale")
        terms = {key: torch.full((), each, dtype=dtype, device=self.device) for key, each in (loss_terms or {}).items()}
        self.teacher = None if teacher is None else Teacher(self.binding, schedule["teacher"], teacher, cos.shape[0])
        self.head_inputs = terms | (self.teacher.head_inputs if self.teacher else {})
        self.reducer: Reducer = reducer or OneWorker()
        self._is_calibrated = False  # asked once: what was seen stays seen
        self.updater = Updater(
            self.binding,
            artifact.manifest,
            model,
            self.reducer,
            moments_dtype=moments_dtype,
            master_dtype=master_dtype,
            stats_every=stats_every,
        )
        self.measuring = self.updater.measuring
        self.optimizer_state = self.updater.optimizer_state
        self.load_optimizer_state = self.updater.load_optimizer_state

    # --- what a trainer calls -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def train_step(
        self,
        microbatches: Sequence[Mapping[str, Tensor]],
        hyperparameters: Tensor,
        max_grad_norm: float | Tensor | None,
        max_grad_value: float | None = None,
    ) -> StepResult:
        """One optimizer step over the microbatches (input_ids, labels, grad_scale[, article_ids]: [B, S], on device).

        `first_row` (int64, 0-d) in a microbatch: the number of its first row among all rows of the step.
        `hyperparameters` [parameters, hyper-parameters] has a row for each of `model.named_parameters()`, in order.
        """
        hyper = hyperparameters.to(self.device, non_blocking=True)
        wide = len(microbatches) > 1 or self.reducer.widens
        skips = self.spec["skips_nonfinite"]
        gathers = skips or max_grad_norm is not None or self.updater.totals is not None
        self.measuring.start()
        looks = gathers or max_grad_value is not None or self.measuring.measures  # at gradients, before their update
        pairs = self.updater.adds_pairs and not looks
        # two gradients at most: of two workers, or of one's two microbatches
        accumulation = Accumulation(leaves_pairs=pairs and self.reducer.is_alone and len(microbatches) == 2)
        pairs = pairs and len(microbatches) == 1

        def update(groups: Iterable[tuple[int, Gradients]], coefficient: Tensor) -> None:
            self.measuring.enter("reduce")
            for group, gradients in groups:
                if not gathers:
                    clip_values(gradients, max_grad_value)
                self.updater.update(group, gradients, hyper, coefficient, wide=wide)
                gradients.clear()

        def on_start() -> None:
            if not gathers:
                update(self.reducer.finished(everything=False, pairs=pairs), self.updater.one)
                self.measuring.enter("backward")

        statistics = Statistics(self.binding.tensors)
        loss = self._sum_gradients(microbatches, accumulation, on_start, statistics)
        self.measuring.enter("reduce")
        verdict = Verdict(None, self.updater.one, None)
        summed = self.reducer.finished(everything=True, pairs=pairs)
        if gathers:
            gathered = list(summed)
            loss = self.reducer.sum_(loss) if skips else loss
            found, judged = [gradients for _, gradients in gathered], loss if skips else None
            verdict = judge(self.updater, found, max_norm=max_grad_norm, max_value=max_grad_value, loss=judged)
            self.updater.total(gathered, hyper, verdict.coefficient, wide=wide)
            summed = iter(gathered)
        update(summed, verdict.coefficient)
        statistics.write(self.reducer, verdict.applied)
        self.reducer.settle()
        self.measuring.finish(self.reducer)
        loss = loss if skips else self.reducer.sum_(loss)
        entropy, objective = loss if loss.ndim else (loss, None)
        return StepResult(entropy, verdict.norm, objective, verdict.applied)

    @torch.no_grad()
    def gradients(self, microbatches: Sequence[Mapping[str, Tensor]]) -> Gradients:
        """Gradients of Σ grad_scale · CE over microbatches and workers, by parameter name; nothing is updated."""
        self._sum_gradients(microbatches, Accumulation(), lambda: None, Statistics(self.binding.tensors))
        return {name: each for _, group in self.reducer.finished(everything=True) for name, each in group.items()}

    @torch.no_grad()
    def calibrate(self, microbatches: Sequence[Mapping[str, Tensor]]) -> None:
        """Forward passes of one step that let the backends see their ranges; nothing else changes."""
        statistics = Statistics(self.binding.tensors)
        for microbatch in microbatches:
            hidden, _ = self._forward(microbatch, statistics, keep=False)
            if self.head["reduce"]:
                self._head_step(hidden, microbatch, statistics)
        statistics.write(self.reducer)

    @torch.no_grad()
    def evaluate(self, microbatch: Mapping[str, Tensor]) -> Tensor:
        """Σ grad_scale · CE of one batch, 0-d. Parameters, optimizer state and backend statistics stay as they are."""
        if not self._is_calibrated:
            require_calibrated(self.model)  # type: ignore[arg-type]
            self._is_calibrated = True
        run, shared = self.binding.run, self._shared(microbatch)
        ids = {"input_ids": microbatch["input_ids"]}
        hidden = run(self.embed["evaluate"], self.binding.inputs(self.embed) | shared | ids)["output"]
        for block in self.blocks:
            hidden = run(block["evaluate"], self.binding.inputs(block) | shared | {"hidden_states": hidden})["output"]
        return total([run(self.head["evaluate"], chunk)["loss"] for chunk in self._chunks(hidden, microbatch)])

    def _sum_gradients(
        self,
        microbatches: Sequence[Mapping[str, Tensor]],
        accumulation: Accumulation,
        on_start: Callable[[], None],
        statistics: Statistics,
    ) -> Tensor:
        """Sweep over the microbatches; each group goes to the reducer when it is final, and `on_start` is called.

        Returns this worker's loss.
        """
        losses = []
        if self.embed["lookup_rows"] is not None:
            ids = [microbatch["input_ids"] for microbatch in microbatches]
            self.reducer.expect_rows(self.embed_group, ids, self.embed["lookup_rows"])
        for number, microbatch in enumerate(microbatches, start=1):
            is_last = number == len(microbatches)

            def keep(group: int, gradients: Gradients, is_last: bool = is_last) -> None:
                if not is_last:
                    accumulation.add(group, gradients)
                    return
                self.reducer.start(group, accumulation.finish(group, gradients))
                on_start()

            losses.append(self._sweep(microbatch, keep, statistics))
        return total(losses)

    # --- forward and backward -----------------------------------------------------------------------------------------

    def _sweep(self, microbatch: Mapping[str, Tensor], sink: Sink, statistics: Statistics) -> Tensor:
        """Forward, head and backward of one microbatch; each group's gradients go to the sink when they are final."""
        run = self.binding.run
        self.measuring.enter("forward")
        hidden, stash = self._forward(microbatch, statistics, keep=True)
        self.measuring.enter("head")
        loss, grad, ends = self._head_step(hidden, microbatch, statistics)
        if self.measuring.measures:
            self.measuring.enter("accuracy")
            hits = [run(self.head["evaluate"], chunk)["accuracy"] for chunk in self._chunks(hidden, microbatch)]
            self.measuring.count_hits(total(hits))
        self.measuring.enter("backward")
        # final but for a tied weight, to which the embedding adds; on their way during the whole backward
        final = self.updater.groups[self.head_group]["parameters"].values()
        sink(self.head_group, {full: ends.pop(full) for full in final})
        for index in reversed(range(len(self.blocks))):
            block = self.blocks[index]
            inputs, kept = stash.pop()
            # state is written after the step, so a recomputed forward reads what the first one read
            outputs = run(block["forward"], inputs) if kept is None else kept
            results = run(block["backward"], inputs | outputs | {"grad_output": grad})
            grad = results["grad_hidden_states"]
            sink(index, self.binding.gradients(block, results))
        ((embed_inputs, embedded),) = stash
        self._embed_backward(embed_inputs | (embedded or {}), grad, ends)
        sink(self.embed_group, ends)
        return loss

    def _forward(
        self, microbatch: Mapping[str, Tensor], statistics: Statistics, *, keep: bool
    ) -> tuple[Tensor, list[Kept]]:
        """The last hidden states and, with `keep`, what the backwards of embedding and blocks need, in this order."""
        shared = self._shared(microbatch)
        flowing = {"input_ids": microbatch["input_ids"]}
        stash: list[Kept] = []
        for number, entry in enumerate((self.embed, *self.blocks)):
            inputs = self.binding.inputs(entry) | shared | flowing
            outputs = self.binding.run(entry["forward"], inputs)
            flowing = {"hidden_states": outputs["output"]}
            statistics.add(entry, outputs)
            if keep:
                stash.append((inputs, None if 1 <= number <= self.recomputed else outputs))
        return outputs["output"], stash

    def _head_step(
        self, hidden: Tensor, microbatch: Mapping[str, Tensor], statistics: Statistics
    ) -> tuple[Tensor, Tensor, Gradients]:
        """Loss, gradient of the hidden states, and the head's parameter gradients, summed over the chunks."""
        names = {local: self.head["parameters"][local] for local in self.head["trained"]}
        sums: Gradients = {}
        if self.head["chunks"] > 1:
            for local, full in names.items():
                dtype = self.binding.input_dtype(self.head["train"], f"sum_{local}")
                sums[f"sum_{local}"] = torch.zeros_like(self.binding.tensors[full], dtype=dtype)
        losses, grads = [], []
        results: dict[str, Tensor] = {}
        taught = self.teacher.states(microbatch["input_ids"], self._shared(microbatch)) if self.teacher else {}
        for chunk in self._chunks(hidden, microbatch, **taught):
            results = self.binding.run(self.head["train"], chunk | sums)
            statistics.add(self.head, results)
            losses.append(results["loss"])
            grads.append(results["grad_hidden_states"])
        gradients = {full: sums[f"sum_{local}"] if sums else results[f"grad_{local}"] for local, full in names.items()}
        grad = grads[0] if len(grads) == 1 else torch.cat(grads)
        return total(losses), grad.view(hidden.shape), gradients

    def _chunks(self, hidden: Tensor, microbatch: Mapping[str, Tensor], **taught: Tensor) -> list[dict[str, Tensor]]:
        """The head's inputs, a dict for each chunk of tokens; `taught` [B, S, H]: a teacher's."""
        rows = hidden.shape[0] * hidden.shape[1] // self.head["chunks"]
        given = {"hidden_states": hidden} | {name: microbatch[name] for name in ("labels", "grad_scale")} | taught
        split = {name: each.flatten(0, 1).split(rows) for name, each in given.items()}
        fixed = self.binding.inputs(self.head) | self.head_inputs
        chunks = [fixed | dict(zip(split, pieces, strict=True)) for pieces in zip(*split.values(), strict=True)]
        if self.head["given"]:  # the head's rows are tokens
            first = microbatch.get("first_row", self.tables["first_row"]) * hidden.shape[1]
            chunks = [chunk | {"first_row": first + index * rows} for index, chunk in enumerate(chunks)]
        return chunks

    def _embed_backward(self, inputs: dict[str, Tensor], grad: Tensor, gradients: Gradients) -> None:
        """Add the embedding's gradients to `gradients`, where a tied weight already has the head's."""
        if not self.embed["trained"]:
            return
        results = self.binding.run(self.embed["backward"], inputs | {"grad_output": grad})
        for local in self.embed["trained"]:
            full, gradient = self.embed["parameters"][local], results[f"grad_{local}"]
            if full in gradients:
                gradient = gradients[full].to(accumulation_dtype(gradient.dtype)).add_(gradient)
            gradients[full] = gradient

    def _shared(self, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        shared = self.tables | {name: microbatch[name] for name in ("first_row",) if name in microbatch}
        if self.spec["article_attention"]:
            shared["articles"] = article_spans(microbatch["article_ids"])
        return shared
