"""Newton–Schulz against what it does to singular values, written out with numpy's decomposition in fp64."""

import numpy as np
import pytest
import torch

from apps.training.optimizers._newton_schulz import EPS, newton_schulz, orthogonalized, product_dtype

SHAPES = [(6, 9), (9, 6), (8, 8), (6, 9), (1, 5), (9, 6), (5, 1), (40, 24)]


def by_singular_values(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """U p(…p(s / ‖s‖)) Vᵀ with p(s) = a s + b s³ + c s⁵, scaled by √max(1, rows/columns)."""
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    values = values / (np.sqrt((values**2).sum()) + EPS)
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    rows, columns = matrix.shape
    return torch.from_numpy((left * values) @ right * np.sqrt(max(1.0, rows / columns)))


@pytest.mark.parametrize("steps", [5, 6])
def test_singular_values_go_where_the_polynomial_sends_them_and_vectors_stay(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    results = orthogonalized(matrices, steps)
    for matrix, result in zip(matrices, results, strict=True):
        assert result.dtype == torch.float64
        assert (result - by_singular_values(matrix, steps)).abs().max() <= 1e-10


def test_together_or_alone_the_numbers_are_the_same_and_equal_shapes_are_one_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from apps.training.optimizers import _newton_schulz

    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    sizes = []

    def counted(batch: list[torch.Tensor], steps: int) -> torch.Tensor:
        sizes.append(len(batch))
        return newton_schulz(batch, steps)

    monkeypatch.setattr(_newton_schulz, "newton_schulz", counted)
    together = orthogonalized(matrices, 5)
    assert sorted(sizes) == [1, 1, 2, 4]  # 8×8, 40×24, two rows or columns, four of 6×9 either way
    for matrix, result in zip(matrices, together, strict=True):
        torch.testing.assert_close(orthogonalized([matrix], 5)[0], result, rtol=0, atol=1e-13)


def test_float32_is_as_exact_as_float32_and_a_zero_matrix_stays_zero() -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(24, 40, generator=generator)
    result, zero = orthogonalized([matrix * 1e-3, torch.zeros(24, 40)], 5)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), by_singular_values(matrix.double() * 1e-3, 5), rtol=0, atol=1e-4)
    assert zero.eq(0).all()


@pytest.mark.parametrize("decades", [0, 2, 4])
@pytest.mark.parametrize("shape", [(128, 352), (128, 160)])
def test_bfloat16_products_lose_no_more_than_the_published_order(
    shape: tuple[int, int], decades: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's numbers, on a CPU, also where singular values are `decades` apart; wide ones take two rounds at once."""
    from apps.training.optimizers import _newton_schulz

    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    if decades:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        matrix = (left * torch.logspace(0, -decades, shape[0], dtype=torch.float64)) @ right
    exact = by_singular_values(matrix, 5)
    plain = (matrix / matrix.norm()).bfloat16()
    for _ in range(5):
        gram = plain @ plain.mT
        plain = 3.4445 * plain + (-4.7750 * gram + 2.0315 * gram @ gram) @ plain
    monkeypatch.setattr(_newton_schulz, "product_dtype", lambda tensor: torch.bfloat16)
    (result,) = orthogonalized([matrix.float()], 5)
    assert result.dtype == torch.float32
    ours, theirs = ((each.double() - exact).norm() for each in (result, plain))
    assert 1e-4 * exact.norm() < ours < theirs  # not exact: the products were bfloat16


def test_the_products_are_in_bfloat16_on_a_gpu_only() -> None:
    for dtype in (torch.float32, torch.float64):
        assert product_dtype(torch.zeros(1, dtype=dtype)) == dtype
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):  # a trace sees fake tensors, on a machine without a GPU too
        assert product_dtype(torch.empty(1, device="cuda")) == torch.bfloat16
        assert product_dtype(torch.empty(1, device="cuda", dtype=torch.float64)) == torch.float64
