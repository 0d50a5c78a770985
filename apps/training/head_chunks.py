"""In how many pieces a step computes its loss: logits of all tokens at once need not fit."""

from __future__ import annotations

from backends.errors import UserError
from backends.precision import BITS, PrecisionPolicy

# Bytes of logits a chunk of the loss may take: small enough to stay near the processor, large enough for its products.
_LOGITS_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}


def logit_bytes(kind: str, precision: PrecisionPolicy, *, with_teacher: bool) -> int:
    """Bytes of a logit in memory: a GPU's kernel reads it as the projection left it, others as float32 or wider."""
    by_kernel = kind == "cuda" and not with_teacher
    return min(BITS[precision.compute] // 8, 4) if by_kernel else 4


def head_chunks(asked: int | None, tokens: int, bytes_a_token: int, kind: str) -> int:
    """Pieces of equal size the loss is computed in: as asked, else the fewest whose logits fit the device's budget."""
    if asked is not None:
        if tokens % asked:
            raise UserError(
                f"compile.head_chunks={asked} does not divide the {tokens} tokens of a batch. Expected one that does."
            )
        return asked
    fits = _LOGITS_BYTES[kind] // bytes_a_token
    return next(chunks for chunks in range(1, tokens + 1) if tokens % chunks == 0 and tokens // chunks <= max(fits, 1))
