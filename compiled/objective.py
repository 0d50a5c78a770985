"""What a step minimises: cross entropy, or with a smoothed target and a penalty of large normalisers.

label_smoothing ε (arXiv 1512.00567, as torch's cross_entropy): the target is 1 − ε at the label and ε / V everywhere.
distill_weight w, distill_temperature T (arXiv 1503.02531): 1 − w of that is left, and w · T² · KL(p ‖ q) is added, p
and q being the softmax of the teacher's logits and of the model's, both divided by T.
z_loss z (arXiv 2204.02311): z · log² Z is added, Z being the softmax's denominator.
Their numbers come in as tensors, so that one artifact serves every ε and z.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from backends.kernels import cross_entropy

TERMS = ("label_smoothing", "z_loss")
DISTILL_TERMS = ("distill_weight", "distill_temperature")


def loss_sum(logits: Tensor, labels: Tensor, grad_scale: Tensor) -> Tensor:
    """Σ grad_scale · CE over tokens: logits [T, V], labels [T], grad_scale [T] → 0-d, in the wider of their dtypes."""
    return (_cross_entropy(logits, labels)[0] * grad_scale).sum()


def loss_and_objective(
    logits: Tensor,
    labels: Tensor,
    grad_scale: Tensor,
    terms: Mapping[str, Tensor],
    teacher_logits: Tensor | None = None,
) -> Tensor:
    """[2]: `loss_sum`, which stays comparable, and the same sum of what is minimised, with the `terms` (0-d) added.

    `teacher_logits` [T, V] belong to DISTILL_TERMS.
    """
    entropy, log_z, target = _cross_entropy(logits, labels)
    objective = entropy
    if "label_smoothing" in terms:
        # (1−ε)(log Z − x_label) + ε(log Z − mean x), with what CE is taken out
        objective = objective + terms["label_smoothing"] * (target - logits.mean(-1))
    if teacher_logits is not None:
        temperature = terms["distill_temperature"]
        divergence = temperature.square() * _divergence(logits / temperature, teacher_logits / temperature)
        objective = objective + terms["distill_weight"] * (divergence - objective)
    if "z_loss" in terms:
        objective = objective + terms["z_loss"] * log_z.square()
    return torch.stack([(entropy * grad_scale).sum(), (objective * grad_scale).sum()])


def loss_and_gradient(
    logits: Tensor,
    dtype: torch.dtype,
    labels: Tensor,
    grad_scale: Tensor,
    terms: Mapping[str, Tensor],
    teacher_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`loss_sum`, or with `terms` `loss_and_objective`, and the gradient of what is minimised for the logits [T, V].

    The logits count as numbers of `dtype`; their gradient has their own. The one place where an implementation for a
    device is chosen.
    """
    if teacher_logits is None and cross_entropy.has_kernel(logits, dtype):
        entropies, objectives, gradient = cross_entropy.cross_entropy_and_gradient(
            logits.detach(), labels, grad_scale, **terms
        )
        sums = [(each * grad_scale).sum() for each in ((entropies, objectives) if terms else (entropies,))]
        return torch.stack(sums) if terms else sums[0], gradient
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        given = (leaf.to(dtype), labels, grad_scale)
        loss = loss_and_objective(*given, terms, teacher_logits) if terms else loss_sum(*given)
        (gradient,) = torch.autograd.grad(loss[1] if terms else loss, [leaf])
    return loss.detach(), gradient


def _divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p ‖ q) of each token, p of the teacher's logits."""
    log_q, log_p = torch.log_softmax(logits, -1), torch.log_softmax(teacher_logits, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CE of each token, log Z, and the label's logit.

    The label's logit is picked by comparing with an index, not by gather: the backward is then one fused elementwise
    pass instead of a scatter into zeros.
    """
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    target = torch.where(vocabulary == labels[:, None], logits, 0).sum(-1)
    log_z = torch.logsumexp(logits, -1)
    return log_z - target, log_z, target


def hits_sum(logits: Tensor, labels: Tensor, grad_scale: Tensor) -> Tensor:
    """Σ grad_scale over the tokens whose likeliest next token is the label (the first of equals), 0-d."""
    return ((logits.argmax(-1) == labels) * grad_scale).sum()
