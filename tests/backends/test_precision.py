import pytest
import torch

from backends.errors import UserError
from backends.precision import PrecisionPolicy, as_torch, resolve


def test_float32_everywhere_by_default():
    assert resolve() == PrecisionPolicy()


def test_bfloat16_parameters_keep_norms_logits_moments_and_masters_in_float32():
    assert resolve("bfloat16") == PrecisionPolicy(
        parameters="bfloat16",
        compute="bfloat16",
        residual="bfloat16",
        norms="float32",
        logits="float32",
        moments="float32",
        master="float32",
    )


def test_float64_stays_float64_and_needs_no_masters():
    policy = resolve("float64")
    assert {policy.compute, policy.norms, policy.logits, policy.moments} == {"float64"}
    assert policy.master == "none"


def test_a_given_dtype_wins_over_the_automatic_one():
    policy = resolve("bfloat16", norms="bfloat16", moments="bfloat16", master="none")
    assert (policy.norms, policy.moments, policy.master) == ("bfloat16", "bfloat16", "none")


@pytest.mark.parametrize("field", ["parameters", "compute", "norms", "residual", "logits", "moments", "master"])
def test_an_unknown_dtype_names_its_field(field):
    with pytest.raises(UserError, match=rf"Unknown dtype for {field} 'flot32'. Did you mean 'float32'\?"):
        resolve(**{field: "flot32"})


def test_masters_narrower_than_the_parameters_are_refused():
    with pytest.raises(UserError, match="float32 are narrower than float64"):
        resolve("float64", master="float32")


def test_as_torch():
    assert as_torch("bfloat16") is torch.bfloat16
    with pytest.raises(UserError, match="Did you mean 'float32'"):
        as_torch("float23")


def test_the_table_names_every_field():
    assert resolve("bfloat16").table().startswith("parameters bfloat16, compute bfloat16, norms float32")


def test_split_masters_belong_to_bfloat16_parameters():
    policy = resolve("bfloat16", master="split")
    assert (policy.master, policy.rounding, policy.master_bits) == ("float32", "split", 16)
    assert policy.named()["rounding"] == "split"
    assert resolve("bfloat16").master_bits == 32
    assert resolve("float32").master_bits == 0
    with pytest.raises(UserError, match=r"master_weights=split belongs to bfloat16 parameters, and .* are float32"):
        resolve("float32", master="split")
