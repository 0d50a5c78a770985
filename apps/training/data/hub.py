"""Asking the Hugging Face hub for something that no local path names."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def asking_the_hub(name: str) -> Iterator[None]:
    """Say that the hub is asked, and keep its client from logging each retry: without a network it takes a minute."""
    print(f"Looking for '{name}' on the Hugging Face hub …", flush=True)
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
