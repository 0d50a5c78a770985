import pytest

from backends.optical_energy import (
    CONSTANTS,
    constants_table,
    digital_energy,
    photon_energy,
    product_energy,
)

OPTIONS = {"input_levels": 256, "output_levels": 256, "photons_per_mac": None}


def test_a_photon_of_the_c_band_has_0_8_electron_volts():
    assert photon_energy() / 1.602176634e-19 == pytest.approx(1239.84 / 1550, rel=1e-4)


def test_each_term_by_hand():
    energy = product_energy(2, 3, 5, input_levels=16, output_levels=64, photons_per_mac=7.0)
    assert energy.light == pytest.approx(2 * 3 * 5 * 7 * photon_energy() / 0.1)
    assert energy.input_converters == pytest.approx(2 * 3 * 16 * 10e-15)
    assert energy.weight_converters == pytest.approx(3 * 5 * 16 * 10e-15)
    assert energy.output_converters == pytest.approx(2 * 5 * 64 * 10e-15)
    assert energy.memory == pytest.approx((2 * 3 * 4 + 3 * 5 * 4 + 2 * 5 * 6) * 100e-12 / 64)
    terms = (energy.light, energy.input_converters, energy.weight_converters, energy.output_converters, energy.memory)
    assert energy.total == pytest.approx(sum(terms))


def test_light_a_multiply_accumulate_falls_with_the_width():
    """1/d, as the paper finds, where the photons are those a given precision needs."""
    narrow, wide = (product_energy(64, width, 64, **OPTIONS).light / (64 * width * 64) for width in (512, 4096))
    assert narrow / wide == pytest.approx(8)


def test_a_large_square_product_is_cheaper_than_a_digital_one_and_a_tiny_one_is_not():
    ratio = {
        size: digital_energy(size, size, size) / product_energy(size, size, size, **OPTIONS).total
        for size in (4, 16384)
    }
    assert ratio[4] < 1 < ratio[16384]


def test_the_table_shows_every_constant_with_its_source():
    heading, *rows = constants_table()
    assert heading == ("constant", "value", "source")
    assert [row[0] for row in rows] == [constant.name for constant in CONSTANTS]
    assert all("assumption" in source or "ISSCC" in source or "arXiv" in source for *_, source in rows)
    shown = [float(value.split()[0]) for _, value, _ in rows]
    assert shown == pytest.approx([constant.value for constant in CONSTANTS], rel=1e-3)
