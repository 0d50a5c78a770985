"""Energy of a token, against multiplications counted by hand."""

import pytest

from apps.parity.energy import energy_constants, energy_per_token
from backends.routing import route
from tests.apps.parity.known_errors import JOULES_PER_MAC, LOUDER, pair


def test_every_product_of_a_forward_counts_once_a_token() -> None:
    _, model = pair()
    routing = route(model, [{"match": "*", "use": LOUDER}])
    found = energy_per_token(model, routing, batch_size=3, length=16, itemsize=4)
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 44)
    attention = 2 * 4 * (8 * 8 + 8 * 8)  # each of 4 heads: 8 channels, half of 16 keys, two products
    assert found.joules == pytest.approx(JOULES_PER_MAC * (linear + attention))
    assert energy_constants(routing) == [("mac", "2e-15 J", "assumption: made up")]
    assert found.share == pytest.approx((linear + attention) / (linear + attention + 32 * 61))


def test_without_a_model_there_is_no_number() -> None:
    _, model = pair()
    found = energy_per_token(model, route(model), batch_size=1, length=8, itemsize=4)
    assert (found.joules, found.share) == (None, 0.0)
