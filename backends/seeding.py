"""Random initial values: each tensor has a generator of its own, so that neither order nor device decides them."""

from __future__ import annotations

import hashlib

import torch


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU that `seed` and the parameter's full name alone decide."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
