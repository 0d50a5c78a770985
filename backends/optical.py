"""Simulated optics: operands and results pass converters with few levels, light does the sum."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.base import Backend, Cost, State, StateSpec
from backends.errors import UserError
from backends.kernels.observe import follow
from backends.kernels.optical_attention import optical_attention
from backends.kernels.optical_linear import optical_linear, optical_matmul
from backends.kernels.optical_product import Converters
from backends.optical_energy import constants_table, product_energy

LINEAR_TENSORS = ("x", "w", "out")
MATMUL_TENSORS = ("a", "b", "out")
ATTENTION_TENSORS = ("q", "k", "v", "scores", "out")


class Optical(Backend):
    """Y = Q(Q(X) · LUT(Q(Wᵀ))) + b, and the same for attention's two products; docs/optical.md has the whole of it.

    Modelled: converters of operands (deterministic rounding) and of results (random rounding, one number an element),
    their ranges, learned while training and frozen in evaluation; the smallest magnitude a modulator shows; shot noise
    if asked for; an energy estimate.

    NOT modelled: noise and drift of weights, crosstalk, dispersion over wavelengths, modulators and detectors that are
    not linear, thermal and amplifier noise, splitting a product that is larger than the processor (each part would
    pass a converter of its own), speed, and a backward pass in optics: gradients are those of the plain products.
    """

    gradient = "straight-through"
    source_modules: ClassVar[tuple[str, ...]] = (
        "backends.kernels.dither",
        "backends.kernels.quantise",
        "backends.kernels.observe",
        "backends.kernels.optical_product",
        "backends.kernels.optical_linear",
        "backends.kernels.optical_linear_cuda",
        "backends.kernels.optical_attention",
        "backends.kernels.optical_attention_cuda",
        "backends.kernels.triton_attention_forward",
        "backends.kernels.triton_attention_backward",
        "backends.kernels.triton_functions",
        "backends.kernels.triton_linear",
        "backends.kernels.triton_quantiser",
    )

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of a rule; `dac_bits` and `adc_bits` replace `q_levels` for operands and for results."""

        q_levels: int = 256
        q_lut_min: float | None = 0.020040
        q_quantiles: tuple[float, float] | None = None
        q_smooth_factor: float = 0.9
        q_init_seed: int = 0
        q_bypass: bool = False
        dac_bits: int | None = None
        adc_bits: int | None = None
        photons_per_mac: float | None = None

        def __post_init__(self) -> None:
            _expect("q_levels", self.q_levels, 2 <= self.q_levels <= 65536, "2 to 65536")
            for name in ("dac_bits", "adc_bits"):
                bits = getattr(self, name)
                _expect(name, bits, bits is None or 1 <= bits <= 16, "1 to 16, or null for q_levels")
            lut = self.q_lut_min
            _expect("q_lut_min", lut, lut is None or 0 <= lut < 1, "from 0 to below 1, or null for none")
            span = self.q_quantiles
            fits = span is None or 0 <= span[0] < span[1] <= 1
            _expect("q_quantiles", span, fits, "[low, high] with 0 <= low < high <= 1, or null for minimum and maximum")
            _expect("q_smooth_factor", self.q_smooth_factor, 0 <= self.q_smooth_factor < 1, "from 0 to below 1")
            _expect("q_init_seed", self.q_init_seed, 0 <= self.q_init_seed < 2**63, "0 to 2^63 - 1")
            light = self.photons_per_mac
            _expect(
                "photons_per_mac", light, light is None or 0 < light < math.inf, "above 0, or null for no shot noise"
            )

    config: Config

    # ---- products ----------------------------------------------------------------------------------------------

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: State, *, training: bool = False
    ) -> tuple[Tensor, State]:
        if self.config.q_bypass:
            return F.linear(x, weight, bias), state
        step, first_row = _number(state), state["first_row"]
        ranges = _ranges(state, LINEAR_TENSORS)
        y, seen = optical_linear(x, weight, bias, ranges, step, first_row, self.converters, observe=training)
        return y, self._after(state, LINEAR_TENSORS, seen)

    def matmul(self, a: Tensor, b: Tensor, state: State, *, training: bool = False) -> tuple[Tensor, State]:
        """One product as in attention, b being the second operand; `attention` does not go through it."""
        if self.config.q_bypass:
            return a @ b, state
        step, first_row = _number(state), state["first_row"]
        ranges = _ranges(state, MATMUL_TENSORS)
        y, seen = optical_matmul(a, b, ranges, step, first_row, self.converters, observe=training)
        return y, self._after(state, MATMUL_TENSORS, seen)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        state: State,
        training: bool = False,
    ) -> tuple[Tensor, State]:
        if self.config.q_bypass:
            return super().attention(
                q, k, v, mask=mask, scale=scale, is_causal=is_causal, state=state, training=training
            )
        y, seen = optical_attention(
            q,
            k,
            v,
            mask,
            scale,
            is_causal,
            _ranges(state, ATTENTION_TENSORS),
            _number(state),
            state["first_row"],
            self.converters,
            observe=training,
        )
        return y, self._after(state, ATTENTION_TENSORS, seen)

    # ---- state -------------------------------------------------------------------------------------------------

    def linear_state(self, in_features: int, out_features: int) -> dict[str, StateSpec]:
        return self._specs(LINEAR_TENSORS)

    def matmul_state(self) -> dict[str, StateSpec]:
        return self._specs(MATMUL_TENSORS)

    def attention_state(self, num_heads: int, head_dim: int) -> dict[str, StateSpec]:
        return self._specs(ATTENTION_TENSORS)

    def _specs(self, tensors: tuple[str, ...]) -> dict[str, StateSpec]:
        """Both ends of each tensor's range, infinite until seen; and what random numbers are counted from."""
        if self.config.q_bypass:
            return {}
        low: Literal["mean", "min"]
        high: Literal["mean", "max"]
        low, high = ("min", "max") if self.config.q_quantiles is None else ("mean", "mean")
        specs = {}
        for tensor in tensors:
            specs[f"{tensor}_min"] = StateSpec((), fill=math.inf, reduce=low)
            specs[f"{tensor}_max"] = StateSpec((), fill=-math.inf, reduce=high)
        specs["step"] = StateSpec((), "int64", reduce="max")
        specs["first_row"] = StateSpec((), "int64", given="first_row")
        specs["layer"] = StateSpec((), "int64", given="layer")
        return specs

    def _after(self, state: State, tensors: tuple[str, ...], seen: tuple[Tensor, ...]) -> State:
        """The state after a step that has `seen` these ranges; with nothing seen, the state as it is."""
        names = [f"{tensor}_{end}" for tensor in tensors for end in ("min", "max")]
        if not seen:
            return {name: state[name] for name in (*names, "step")}
        # all at once: on a GPU each number by itself is a kernel of its own
        before = torch.stack([state[name] for name in names])
        after = follow(before, torch.stack(seen), self.config.q_smooth_factor)
        return dict(zip(names, after.unbind(), strict=True)) | {"step": state["step"] + 1}

    # ---- what it is ----------------------------------------------------------------------------------------------

    @property
    def converters(self) -> Converters:
        """The options as the products take them."""
        config = self.config
        return Converters(
            input_levels=config.q_levels if config.dac_bits is None else 2**config.dac_bits,
            output_levels=config.q_levels if config.adc_bits is None else 2**config.adc_bits,
            lut_min=config.q_lut_min,
            quantiles=config.q_quantiles,
            photons_per_mac=config.photons_per_mac,
            seed=config.q_init_seed,
        )

    def cost(self, m: int, k: int, n: int, *, itemsize: int = 4) -> Cost:
        """FLOPs and bytes of the dense product it stands for; joules of the optical one (see optical_energy.py)."""
        cost = super().cost(m, k, n, itemsize=itemsize)
        if self.config.q_bypass:
            return cost
        energy = product_energy(
            m,
            k,
            n,
            input_levels=self.converters.input_levels,
            output_levels=self.converters.output_levels,
            photons_per_mac=self.config.photons_per_mac,
        )
        return dataclasses.replace(cost, joules=energy.total)

    def cost_constants(self) -> list[tuple[str, str, str]]:
        return [] if self.config.q_bypass else constants_table()[1:]


def _number(state: State) -> Tensor:
    """The step and the layer in one number: with layers alike, errors of the same sign would add up over the depth."""
    return state["step"] + (state["layer"] << 32)


def _ranges(state: State, tensors: tuple[str, ...]) -> tuple[Tensor, ...]:
    return tuple(state[f"{tensor}_{end}"] for tensor in tensors for end in ("min", "max"))


def _expect(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise UserError(f"{name} is {value}. Expected {expected}.")
