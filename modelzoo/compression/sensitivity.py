"""How much the loss minds an error in a layer's outputs: second moments of its gradients there.

An error e of a layer's outputs costs gᵀe to first order, g being the loss's gradient at them; summed over tokens
that are independent, E[(gᵀe)²] = eᵀ G e with G = E[ggᵀ], the empirical Fisher information of the outputs. So an error
counts as eᵀ G e where least squares counts eᵀe: for weights, that is Hsu et al. (arXiv 2207.00112) by rows, Martens
and Grosse (arXiv 1503.05671) with both factors, the inputs' and the gradients'.

Of a layer with fewer inputs than outputs WᵀGW is summed in place of G. It is what an error inside the range of W needs,
and smaller: half a gigabyte for a Llama-2-7B's block where G takes 1.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backends.errors import UserError
from modelzoo.compression.block_calls import Batch, without_cache
from modelzoo.compression.passes import Tell, counted

Sum = Callable[[Tensor], Tensor]
# of the mean eigenvalue of G, added to G: what no gradient was seen for counts something
DAMPING = 0.1


@dataclass
class Sensitivity:
    """Sums over tokens of a layer's output gradients g [out]: `squared`, Σ|g|², and `second`.

    `second` is Σggᵀ [out, out], or Wᵀ Σggᵀ W [in, in] where `of_inputs`; float64, on a GPU float32.
    """

    second: Tensor
    squared: Tensor
    of_inputs: bool

    @classmethod
    def empty(cls, layer: nn.Linear) -> Sensitivity:
        device = layer.weight.device
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        features = min(layer.in_features, layer.out_features)
        second = torch.zeros(features, features, dtype=dtype, device=device)
        squared = torch.zeros((), dtype=torch.float64, device=device)
        return cls(second, squared, layer.in_features < layer.out_features)

    def add(self, layer: nn.Linear, gradient: Tensor) -> None:
        """Count the tokens of a gradient [..., out] for the layer's outputs."""
        rows = gradient.detach().reshape(-1, gradient.shape[-1]).to(self.second.dtype)
        self.squared += rows.double().square().sum()
        if self.of_inputs:
            rows = rows @ layer.weight.detach().to(rows.dtype)
        self.second += rows.t() @ rows

    def damping(self, out_features: int) -> Tensor:
        """What is added to the diagonal of Σggᵀ, 0-d; 1 where no gradient was seen, so that all outputs count alike."""
        mean = self.squared / out_features
        return torch.where(mean > 0, DAMPING * mean, 1.0)


def sensitivities(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    sum_: Sum,
    tell: Tell = lambda done, total: None,
) -> dict[str, Sensitivity]:
    """Of each layer, from the gradients of the model's loss on all batches; one forward and backward for each, which
    `tell` hears of.

    Blocks are computed again in the backward, so that activations of one are held. No parameter gets a gradient.
    UserError for batches without a loss, and naming a layer whose gradients are not finite.
    """
    found = {name: Sensitivity.empty(layer) for name, layer in layers.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_cache(model))
        stack.enter_context(_frozen(model))
        stack.enter_context(_recomputed(blocks))
        for name, layer in layers.items():
            handle = layer.register_forward_hook(partial(_watch, found[name]))
            stack.callback(handle.remove)
        for batch in counted(batches, tell):
            loss = summed_loss(model, batch)
            if loss.requires_grad:
                loss.backward()
    for name, each in found.items():
        each.second, each.squared = sum_(each.second), sum_(each.squared)
        if not bool(torch.isfinite(each.second).all()):
            raise UserError(
                f"The gradients at the outputs of layer '{name}' are not finite on the calibration data. Compress a "
                "model that computes them, perhaps in float32, or use weighting='equal'."
            )
    return found


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's loss summed over the batch's counted tokens, 0-d.

    A batch's `labels` say what is counted, by the model's own loss; without them a causal language model predicts its
    `input_ids`, but for padding. UserError for anything else.
    """
    outputs, labels = model(**batch), batch.get("labels")
    logits, loss = getattr(outputs, "logits", None), getattr(outputs, "loss", None)
    if isinstance(labels, Tensor) and isinstance(loss, Tensor):
        return loss * (labels != -100).sum()
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    predicts_next = type(model).__name__.endswith("ForCausalLM")
    if labels is None and predicts_next and isinstance(logits, Tensor) and isinstance(ids, Tensor):
        targets = ids.masked_fill(mask == 0, -100) if isinstance(mask, Tensor) else ids
        rows = zip(logits.unbind(0), targets, strict=True)
        return torch.stack([checkpoint(_next_tokens, *row, use_reentrant=False) for row in rows]).sum()
    raise UserError(
        f"weighting='gradient' needs a loss, and {type(model).__name__} gives none on the calibration data. Give "
        "batches with labels, or use weighting='equal'."
    )


def _next_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    """A row's loss; computed again in the backward, so that one row's logits are held in float32."""
    wide = logits[:-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, ids[1:], reduction="sum")


def _watch(found: Sensitivity, layer: nn.Linear, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """Have the gradient for y added to `found` once it is known."""
    y = y if y.requires_grad else y.detach().requires_grad_()
    y.register_hook(lambda gradient: found.add(layer, gradient))
    return y


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _recomputed(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have each block's forward computed again in the backward."""
    own = [vars(block).get("forward") for block in blocks.values()]  # where somebody has put another one
    for block in blocks.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks.values(), own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
