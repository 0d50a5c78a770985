import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends.kernels.optical_linear import optical_linear, optical_matmul, runs_in_half
from backends.kernels.optical_product import (
    FITS_FLOAT16,
    NARROW_LEVELS,
    Converters,
    Operands,
    multiply,
)
from backends.kernels.quantise import Range

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-23, torch.float64: 2.0**-52}
ZERO = torch.zeros((), dtype=torch.int64)


def converters(input_levels=256, output_levels=256, lut_min=0.020040, photons=None, seed=0):
    return Converters(input_levels, output_levels, lut_min, None, photons, seed)


def scalars(*ends: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(end, dtype=torch.float32) for end in ends)


def reference_operand(x, low, high, levels, lut_min):
    """Q(x) in float64 with how far float32 may be from it: a level where a tie is near, a lift where 0 is."""
    x, step, size = x.double(), (high - low) / (levels - 1), max(abs(low), abs(high))
    u = (x.clamp(low, high) - low) / (high - low + 1e-8) * (levels - 1)
    value = u.round() * step + low
    slack = 64 * EPS[torch.float32] * size + ((u % 1 - 0.5).abs() < 1e-3).double() * step
    if lut_min is not None:
        near_zero = value.abs() < 1e-5 * size
        slack = slack + (near_zero | (slack >= step)).double() * (lut_min * size)
        value = torch.where((value > 0) & (value < lut_min * high), lut_min * high, value)
        value = torch.where((value < 0) & (value > -lut_min * abs(low)), -lut_min * abs(low), value)
    return value, slack


def allowed_error(x, w, b, ranges, options):
    """The product of quantised operands in float64, clamped, plus the bias; and how far a result may be from it."""
    left, left_slack = reference_operand(x.reshape(-1, x.shape[-1]), *ranges[:2], options.input_levels, None)
    right, right_slack = reference_operand(w, *ranges[2:4], options.input_levels, options.lut_min)
    product = left @ right.T
    slack = left_slack @ (right.abs() + right_slack).T + left.abs() @ right_slack.T
    low, high = ranges[4:]
    allowed = slack + (high - low) / (options.output_levels - 1) * (1 + 1e-3) + 1e-6 * (high - low)
    exact = product.clamp(low, high) + (0 if b is None else b.double())
    if x.dtype == torch.bfloat16:
        allowed = allowed + 2.0**-8 * exact.abs() + 2.0**-8 * allowed
    return (one.view(*x.shape[:-1], len(w)) for one in (exact, allowed))


@given(
    rows=st.integers(1, 9),
    inner=st.sampled_from([1, 2, 3, 5, 7, 17, 33, 65]),
    columns=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    input_levels=st.integers(2, 1024),
    output_levels=st.integers(2, 1024),
    lut_min=st.sampled_from([None, 0.020040, 0.2]),
    tightness=st.floats(0.3, 1.5),
    shift=st.floats(-1, 1),
    seed=st.integers(0, 500),
)
def test_every_element_is_within_one_level_of_the_product_of_quantised_operands(
    rows, inner, columns, dtype, input_levels, output_levels, lut_min, tightness, shift, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, inner, generator=generator, dtype=torch.float64) + shift).to(dtype)
    w = torch.randn(columns, inner, generator=generator, dtype=torch.float64).mul(0.3).to(dtype)
    b = torch.randn(columns, generator=generator, dtype=torch.float64).to(dtype)
    # ranges that cut some of the values, or leave room
    ranges = [round(tightness * end, 3) for end in (shift - 2, shift + 2, -0.7, 0.6, -inner - 0.5, inner + 0.7)]
    ranges = [float(end) for end in scalars(*ranges)]
    options = converters(input_levels, output_levels, lut_min, seed=seed)
    y, _ = optical_linear(x, w, b, scalars(*ranges), ZERO + 3, ZERO, options, observe=False)
    exact, allowed = allowed_error(x, w, b, ranges, options)
    assert ((y.double() - exact).abs() <= allowed).all()


def test_few_levels_give_few_values():
    x, w = torch.randn(50, 9), torch.randn(6, 9)
    ranges = scalars(-2, 2, -2, 2, -10, 10)
    y, _ = optical_linear(x, w, None, ranges, ZERO, ZERO, converters(4, 3), observe=False)
    assert set(y.flatten().tolist()) == {-10.0, 0.0, 10.0}


def test_operands_and_results_have_levels_of_their_own():
    x, w = torch.rand(40, 1), torch.ones(1, 1)
    fine = optical_linear(x, w, None, scalars(0, 1, 0, 1, 0, 1), ZERO, ZERO, converters(2, 1024), observe=False)[0]
    assert set(fine.round(decimals=2).flatten().tolist()) == {0.0, 1.0}


def test_a_mean_over_steps_approaches_the_product_of_quantised_operands():
    x, w = torch.randn(4, 9), torch.randn(5, 9)
    ranges = scalars(-3, 3, -3, 3, -40, 40)
    exact = optical_linear(
        x, w, None, (*ranges[:4], *scalars(torch.inf, -torch.inf)), ZERO, ZERO, converters(), observe=False
    )[0]
    steps = [
        optical_linear(x, w, None, ranges, ZERO + step, ZERO, converters(output_levels=16), observe=False)[0]
        for step in range(500)
    ]
    deviation = 80 / 15 / 2 / 500**0.5  # of a mean of coins that are at most one level apart
    assert (torch.stack(steps).mean(0) - exact).abs().max() < 4.5 * deviation


# ---- ranges ------------------------------------------------------------------------------------------------------


def test_what_is_seen_are_the_extremes_before_any_clamping():
    x, w = torch.randn(3, 5, 7), torch.randn(4, 7)
    narrow = scalars(-0.1, 0.1, -0.1, 0.1, -0.01, 0.01)
    y, seen = optical_linear(x, w, None, narrow, ZERO, ZERO, converters(), observe=True)
    assert y.abs().max() <= 0.01 * (1 + 1e-6)
    assert seen[:4] == (x.min(), x.max(), w.min(), w.max())
    assert seen[4] < -0.01
    assert seen[5] > 0.01


@pytest.mark.parametrize("known", ["x", "w", "out"])
def test_each_range_may_be_known_while_the_others_are_not(known):
    x, w = torch.randn(6, 7), torch.randn(4, 7)
    ends = dict.fromkeys(("x", "w", "out"), (torch.inf, -torch.inf)) | {known: (-1.0, 1.0)}
    ranges = scalars(*(end for pair in ends.values() for end in pair))
    y, _ = optical_linear(x, w, None, ranges, ZERO, ZERO, converters(3, 3, lut_min=None), observe=True)
    rounded = {"x": x.clamp(-1, 1).round() @ w.T, "w": x @ w.clamp(-1, 1).round().T}
    if known == "out":
        assert set(y.flatten().tolist()) <= {-1.0, 0.0, 1.0}
    else:
        torch.testing.assert_close(y, rounded[known])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_no_number_is_not_clamped_away(broken):
    x, w = torch.randn(4, 7), torch.randn(5, 7)
    x[2, 3] = broken
    ranges = scalars(-2, 2, -2, 2, -9, 9)
    y, seen = optical_linear(x, w, None, ranges, ZERO, ZERO, converters(), observe=True)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()
    assert not seen[1].isfinite()


# ---- dither ------------------------------------------------------------------------------------------------------


def test_rows_give_the_same_bits_whichever_worker_computes_them():
    x, w = torch.randn(8, 3, 7), torch.randn(5, 7)
    ranges = scalars(-2, 2, -2, 2, -9, 9)

    def compute(part, first_row):
        return optical_linear(part, w, None, ranges, ZERO + 5, ZERO + first_row, converters(), observe=False)[0]

    whole = compute(x, 0)
    for rows in (1, 2, 4):
        dealt = [compute(part, rows * number) for number, part in enumerate(x.split(rows))]
        torch.testing.assert_close(torch.cat(dealt), whole, rtol=0, atol=1e-6)  # a product's own rounding, no level


def test_steps_and_seeds_dither_differently():
    x, w, ranges = torch.randn(8, 7), torch.randn(5, 7), scalars(-2, 2, -2, 2, -9, 9)
    results = [
        optical_linear(x, w, None, ranges, ZERO + step, ZERO, converters(seed=seed), observe=False)[0]
        for step, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert not any(torch.equal(results[0], other) for other in results[1:])


# ---- shot noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signs", ["one", "both"])
def test_shot_noise_has_the_deviation_of_n_counted_photons(signs):
    """SNR = √N for products of one sign; where signs cancel, the noise is that of all the light."""
    inner, photons = 33, 4.0
    x, w = torch.rand(1, inner) + 0.1, torch.rand(1, inner) + 0.1
    if signs == "both":
        w = w * torch.linspace(-1, 1, inner).sign()
    unknown = scalars(*(torch.inf, -torch.inf) * 3)
    many = x.expand(20000, inner)
    y, _ = optical_linear(many, w, None, unknown, ZERO, ZERO, converters(photons=photons), observe=False)
    light = (x.double() @ w.double().abs().T).item()
    deviation = light / (photons * inner) ** 0.5
    assert abs(y.double().mean() - (x.double() @ w.double().T).item()) < 4 * deviation / 20000**0.5
    assert abs(y.double().std() / deviation - 1) < 0.02


def test_without_photons_there_is_no_noise():
    x, w = torch.randn(3, 7), torch.randn(5, 7)
    unknown = scalars(*(torch.inf, -torch.inf) * 3)
    assert torch.equal(optical_linear(x, w, None, unknown, ZERO, ZERO, converters(), observe=False)[0], x @ w.T)


# ---- shapes, devices, gradients ------------------------------------------------------------------------------------


def test_products_of_a_batch_are_those_of_each():
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6)
    ranges = scalars(-2, 2, -2, 2, -9, 9)
    got, seen = optical_matmul(a, b, ranges, ZERO, ZERO, converters(output_levels=2**16), observe=True)
    for i in range(2):
        for j in range(3):
            fine = converters(output_levels=2**16)
            one, _ = optical_linear(a[i, j], b[i, j].T, None, ranges, ZERO, ZERO, fine, observe=False)
            torch.testing.assert_close(got[i, j], one, rtol=0, atol=2 * 18 / 2**16)
    assert seen[:4] == (a.min(), a.max(), b.min(), b.max())


def test_16_bit_tensors_on_a_gpu_take_float16_products():
    assert not runs_in_half(torch.ones(1, dtype=torch.bfloat16))
    assert not runs_in_half(torch.ones(1))


def test_only_the_tensors_that_came_in_are_kept_for_the_backward():
    x, w = torch.randn(3, 4, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        optical_linear(x, w, None, scalars(-2, 2, -2, 2, -9, 9), ZERO, ZERO, converters(), observe=True)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), w.data_ptr()}


@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)])
def test_gradients_are_those_of_the_plain_product_for_whoever_wants_one(needed):
    operands = [torch.randn(2, 3, 7), torch.randn(5, 7), torch.randn(5)]
    operands = [one.double().requires_grad_(wants) for one, wants in zip(operands, needed, strict=True)]
    wanted = [one for one in operands if one.requires_grad]
    y, _ = optical_linear(*operands, scalars(-1, 1, -1, 1, -1, 1), ZERO, ZERO, converters(), observe=True)
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = torch.autograd.grad(torch.nn.functional.linear(*operands), wanted, upstream)
    torch.testing.assert_close(torch.autograd.grad(y, wanted, upstream), expected)


@pytest.mark.parametrize("levels", [NARROW_LEVELS, 2])
@pytest.mark.parametrize("shape", [(64, 300, 48), (3, 2, 16, 40, 24)])
def test_products_of_16_bit_tensors_are_off_by_a_small_part_of_a_level(shape, levels):
    """What a GPU does, on a CPU: float16 operands and sums against float64."""
    *batch, rows, inner, columns = shape
    generator = torch.Generator().manual_seed(5)
    left = torch.rand(*batch, rows, inner, generator=generator) * 3 - 1.5
    right = torch.rand(*batch, inner, columns, generator=generator) * 0.04 - 0.02
    ends = [Range(*scalars(-end, end)) for end in (1.5, 0.02)]
    found = multiply(Operands(left, right, *ends), True, levels)
    assert found.dtype == torch.float32
    exact = left.double() @ right.double()
    level = 2 * exact.abs().max() / (NARROW_LEVELS - 1)
    error = (found - exact).abs() / level
    assert error.max() < 0.15
    assert error.mean() < 0.03


def test_sums_that_float16_cannot_hold_are_not_stored_as_such(monkeypatch):
    """All terms 1 and more of them than float16 reaches: they take the way of finer converters, which a CPU lacks."""
    ends = [Range(*scalars(-1.0, 1.0))] * 2
    many = torch.ones(1, 2 * FITS_FLOAT16)
    monkeypatch.setattr(torch, "mm", lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype))
    assert multiply(Operands(many, many.t(), *ends), True, 256).item() == 2 * FITS_FLOAT16
    few = many[:, :FITS_FLOAT16]
    assert multiply(Operands(few, few.t(), *ends), True, 256).item() == FITS_FLOAT16
