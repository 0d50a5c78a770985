"""How the rank of two thin matrices and their numbers go together, for a layer of in to out features."""

_IN_STEPS_FROM, _STEP = 64, 8  # below, a step of 8 is more than an eighth of the rank


def break_even(in_features: int, out_features: int) -> int:
    """The rank from which two factors hold no fewer numbers than the matrix itself: ⌈in·out / (in + out)⌉."""
    return -(-in_features * out_features // (in_features + out_features))


def rank_for(keep: float, in_features: int, out_features: int) -> int:
    """The rank whose factors hold at most `keep` times the matrix's numbers: ⌊keep·in·out / (in + out)⌋, at least 1;
    of the ranks that `rank_after` knows."""
    rank = max(1, int(keep * in_features * out_features / (in_features + out_features)))
    return rank if rank < _IN_STEPS_FROM else rank - rank % _STEP


def rank_after(rank: int) -> int:
    """The next rank that is chosen: from 64 on they are multiples of 8.

    A GPU reads 16 bytes at a time: of rank 750 the rows of 16-bit factors begin between two such, and its matrix
    products copy them or take a slower way.
    """
    return rank + (1 if rank < _IN_STEPS_FROM else _STEP)
