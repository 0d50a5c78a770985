"""What an optical product costs in joules, and where each number comes from.

Four terms a product [m, k] · [k, n]: light (every multiply-accumulate), converters for the inputs (m·k) and the weights
(k·n), converters for the outputs (m·n), and memory (every operand read once, every output written once). A converter of
b bits takes (its figure of merit) · 2ᵇ. The processor is assumed as wide as the product: an input is converted once and
fans out to all n columns.

Light: `photons_per_mac` detected photons a multiply-accumulate. Without it, as many as keep shot noise below one output
level, N = L² photons a dot product, which is L²/k a multiply-accumulate: it falls with the width, as found in
*Optical Transformers* (arXiv 2302.10360). The numbers are an estimate of an order of magnitude, not of a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PLANCK, LIGHT_SPEED = 6.62607015e-34, 299792458.0  # J s, m/s: exact by definition


@dataclass(frozen=True)
class Constant:
    """A number of the energy model and its source; an assumption says so."""

    name: str
    value: float
    unit: str
    source: str


CONSTANTS = (
    Constant("wavelength", 1.55e-6, "m", "assumption: the telecommunication C band"),
    Constant("laser_to_detector", 0.1, "", "assumption: wall plug to detected photon, losses included"),
    Constant("dac_per_level", 10e-15, "J", "assumption: as the ADC"),
    Constant(
        "adc_per_level", 10e-15, "J", "assumption: figure of merit of Walden; records are near 2 fJ (Harpe, ISSCC 2013)"
    ),
    Constant(
        "memory_per_bit", 100e-12 / 64, "J", "Horowitz, ISSCC 2014: 64 bits from a cache of 1 MB take 100 pJ (45 nm)"
    ),
    Constant("digital_mac", 300e-15, "J", "arXiv 2302.10360: a digital processor to compare with"),
)
_VALUES = {constant.name: constant.value for constant in CONSTANTS}


@dataclass(frozen=True)
class Energy:
    """Joules of one product, by term."""

    light: float
    input_converters: float
    weight_converters: float
    output_converters: float
    memory: float

    @property
    def total(self) -> float:
        return self.light + self.input_converters + self.weight_converters + self.output_converters + self.memory


def photon_energy() -> float:
    """h c / λ, joules."""
    return PLANCK * LIGHT_SPEED / _VALUES["wavelength"]


def product_energy(
    m: int, k: int, n: int, *, input_levels: int, output_levels: int, photons_per_mac: float | None
) -> Energy:
    """Joules of one product [m, k] · [k, n]."""
    photons = output_levels**2 if photons_per_mac is None else photons_per_mac * k
    input_bits, output_bits = math.log2(input_levels), math.log2(output_levels)
    return Energy(
        light=m * n * photons * photon_energy() / _VALUES["laser_to_detector"],
        input_converters=m * k * input_levels * _VALUES["dac_per_level"],
        weight_converters=k * n * input_levels * _VALUES["dac_per_level"],
        output_converters=m * n * output_levels * _VALUES["adc_per_level"],
        memory=((m * k + k * n) * input_bits + m * n * output_bits) * _VALUES["memory_per_bit"],
    )


def digital_energy(m: int, k: int, n: int) -> float:
    """Joules of the same product on the digital processor the paper compares with."""
    return m * k * n * _VALUES["digital_mac"]


def constants_table() -> list[tuple[str, str, str]]:
    """The model's constants as rows of text, a heading first: constant, value, source."""
    rows = [
        (constant.name, f"{constant.value:.4g} {constant.unit}".rstrip(), constant.source) for constant in CONSTANTS
    ]
    return [("constant", "value", "source"), *rows]
