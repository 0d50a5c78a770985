"""The dtype of every kind of tensor in a run, in one place. Imports torch only when a torch dtype is asked for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from backends.errors import UserError, unknown

if TYPE_CHECKING:
    import torch

BITS = {"bfloat16": 16, "float32": 32, "float64": 64}


def as_torch(name: str) -> torch.dtype:
    """The torch dtype called `name` (one of `BITS`)."""
    if name not in BITS:
        raise unknown("dtype", name, BITS)
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def at_least_float32(name: str) -> str:
    """float32 for anything narrower, else `name` itself."""
    return name if BITS[name] >= 32 else "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionPolicy:
    """Dtype names, all resolved. `master` is "none" or the dtype of the wider copy that the optimizer updates.

    `rounding` of updated parameters without masters: "nearest" or "stochastic"; with masters "nearest", or "split":
    a master is kept as its parameter and what that lacks (`split_masters`).
    """

    parameters: str = "float32"
    compute: str = "float32"
    norms: str = "float32"
    residual: str = "float32"
    logits: str = "float32"
    moments: str = "float32"
    master: str = "none"
    rounding: str = "nearest"

    @property
    def master_bits(self) -> int:
        """Bits that are stored of a master, beside the parameter."""
        if self.master == "none":
            return 0
        return BITS[self.master] - (BITS[self.parameters] if self.rounding == "split" else 0)

    def named(self) -> dict[str, str]:
        """Every field that says something: to round to the nearest goes without saying."""
        return {
            key: value for key, value in dataclasses.asdict(self).items() if (key, value) != ("rounding", "nearest")
        }

    def table(self) -> str:
        """One line a run prints: every field with its dtype."""
        return ", ".join(f"{name} {value}" for name, value in self.named().items())


def resolve(
    parameters: str = "float32",
    *,
    compute: str = "auto",
    norms: str = "auto",
    residual: str = "auto",
    logits: str = "auto",
    moments: str = "auto",
    master: str = "auto",
) -> PrecisionPolicy:
    """Fill every "auto" from the parameters' dtype.

    Compute and residual stream follow the parameters; norms, logits and moments are at least float32. 16-bit parameters
    get float32 masters: a pure bfloat16 AdamW at lr 1e-5 changes only about 16 % of the weights. `master` "stochastic":
    no masters, updates rounded to bfloat16 at random without bias. "split": float32 masters of bfloat16 parameters, of
    which only the bits that the parameters lack are stored.
    """
    given = {
        "compute": (compute, parameters),
        "norms": (norms, at_least_float32(parameters) if parameters in BITS else ""),
        "residual": (residual, parameters),
        "logits": (logits, at_least_float32(parameters) if parameters in BITS else ""),
        "moments": (moments, at_least_float32(parameters) if parameters in BITS else ""),
    }
    if parameters not in BITS:
        raise unknown("dtype for parameters", parameters, BITS)
    fields = {name: automatic if value == "auto" else value for name, (value, automatic) in given.items()}
    for name, value in fields.items():
        if value not in BITS:
            raise unknown(f"dtype for {name}", value, ("auto", *BITS))
    rounding = "nearest"
    if master in ("stochastic", "split"):
        if parameters != "bfloat16":
            what = "rounds updates to bfloat16" if master == "stochastic" else "belongs to bfloat16 parameters"
            raise UserError(
                f"optimizer.master_weights={master} {what}, and the parameters are {parameters}. "
                "Use model.dtype=bfloat16, or optimizer.master_weights=auto."
            )
        master, rounding = ("none" if master == "stochastic" else "float32"), master
    if master == "auto":
        master = "float32" if BITS[parameters] < 32 else "none"
    if master not in ("none", *BITS):
        raise unknown("dtype for master", master, ("auto", "none", "split", "stochastic", *BITS))
    if master != "none" and BITS[master] < BITS[parameters]:
        raise UserError(
            f"Master weights in {master} are narrower than {parameters} parameters. "
            "Expected at least the parameters' width; use optimizer.master_weights=auto."
        )
    return PrecisionPolicy(parameters=parameters, master=master, rounding=rounding, **fields)
