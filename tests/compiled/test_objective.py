"""What a step minimises, against torch's cross entropy, the formulas in fp64, and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compiled.objective import DISTILL_TERMS, TERMS, loss_and_objective, loss_sum


def reference_loss(logits: Tensor, labels: Tensor, grad_scale: Tensor) -> Tensor:
    return (F.cross_entropy(logits.to(grad_scale.dtype), labels, reduction="none") * grad_scale).sum()


@given(st.integers(1, 20), st.integers(2, 40), st.integers(0, 10**6), st.sampled_from([1.0, 30.0, 300.0]))
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(rows: int, vocab: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    scale = torch.rand(rows, generator=generator, dtype=torch.float64) * (torch.rand(rows, generator=generator) < 0.7)
    ours, theirs = loss_sum(logits, labels, scale), reference_loss(logits, labels, scale)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12, abs=1e-12)
    (mine,), (other,) = torch.autograd.grad(ours, [logits]), torch.autograd.grad(theirs, [logits])
    assert (mine - other).abs().max() <= 1e-12


def test_a_token_with_weight_zero_adds_exactly_nothing() -> None:
    logits, labels = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64)
    assert loss_sum(logits * 1e4, labels, torch.zeros(4)).item() == 0.0
    one = torch.tensor([0.0, 1.0, 0.0, 0.0])
    expected = F.cross_entropy(logits[1:2], labels[1:2]).item()
    assert loss_sum(logits, labels, one).item() == pytest.approx(expected, rel=1e-6)
    assert loss_sum(logits.bfloat16(), labels, one).dtype == torch.float32


def sample(seed: int, rows: int, vocab: int, size: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    return logits, labels, torch.rand(rows, generator=generator, dtype=torch.float64)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 30), st.floats(0, 0.99), st.floats(0, 2))
def test_the_objective_is_the_formula_and_the_loss_stays(
    seed: int, rows: int, vocab: int, eps: float, z: float
) -> None:
    logits, labels, scale = sample(seed, rows, vocab)
    terms = {"label_smoothing": torch.tensor(eps, dtype=torch.float64), "z_loss": torch.tensor(z, dtype=torch.float64)}
    loss, objective = loss_and_objective(logits, labels, scale, terms).tolist()
    p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    target = (1 - eps) * F.one_hot(labels, vocab).double() + eps / vocab
    expected = (scale * (-(target * p.log()).sum(-1) + z * torch.exp(logits).sum(-1).log() ** 2)).sum().item()
    assert loss == pytest.approx(reference_loss(logits, labels, scale).item(), rel=1e-12, abs=1e-12)
    assert objective == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("names", [(), ("label_smoothing",), ("z_loss",), TERMS, DISTILL_TERMS, TERMS + DISTILL_TERMS])
def test_the_gradient_is_that_of_finite_differences(names: tuple[str, ...]) -> None:
    logits, labels, scale = sample(3, 4, 7)
    numbers = {
        "label_smoothing": torch.tensor(0.2, dtype=torch.float64),
        "z_loss": torch.tensor(0.3, dtype=torch.float64),
        "distill_weight": torch.tensor(0.4, dtype=torch.float64),
        "distill_temperature": torch.tensor(1.5, dtype=torch.float64),
    }
    terms = {name: numbers[name] for name in names}
    teacher = sample(4, 4, 7)[0] if "distill_weight" in terms else None
    wanted = logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss_and_objective(x, labels, scale, terms, teacher)[1], (wanted,), atol=1e-7
    )


@given(st.integers(0, 10**6), st.integers(2, 30), st.floats(0.01, 1), st.floats(0.3, 9))
def test_a_teachers_part_is_the_softened_divergence(seed: int, vocab: int, weight: float, temperature: float) -> None:
    logits, labels, scale = sample(seed, 5, vocab)
    teacher = sample(seed + 1, 5, vocab, size=8.0)[0]
    terms = {
        "distill_weight": torch.tensor(weight, dtype=torch.float64),
        "distill_temperature": torch.tensor(temperature, dtype=torch.float64),
    }
    loss, objective = loss_and_objective(logits, labels, scale, terms, teacher).tolist()
    p, q = (torch.exp(each / temperature) for each in (teacher, logits))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    divergence = (p * (p / q).log()).sum(-1)
    entropy = reference_loss(logits, labels, scale).item()
    expected = (1 - weight) * entropy + weight * temperature**2 * (scale * divergence).sum().item()
    assert loss == pytest.approx(entropy, rel=1e-12, abs=1e-12)
    assert objective == pytest.approx(expected, rel=1e-9, abs=1e-9)
    alike = loss_and_objective(logits, labels, scale, terms, logits)[1].item()
    assert alike == pytest.approx((1 - weight) * entropy, rel=1e-10, abs=1e-12)


def test_label_smoothing_is_torchs() -> None:
    logits, labels, scale = sample(5, 6, 11, size=30.0)
    found = loss_and_objective(logits, labels, scale, {"label_smoothing": torch.tensor(0.1, dtype=torch.float64)})[
        1
    ].item()
    expected = (F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1) * scale).sum().item()
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_token_that_does_not_count_adds_nothing_to_the_objective() -> None:
    logits, labels, _ = sample(7, 4, 9, size=1e4)
    terms = {
        "label_smoothing": torch.tensor(0.1, dtype=torch.float64),
        "z_loss": torch.tensor(1.0, dtype=torch.float64),
    }
    assert loss_and_objective(logits, labels, torch.zeros(4).double(), terms).tolist() == [0.0, 0.0]
