"""How the rank of two thin matrices and their numbers go together, for a layer of in to out features."""


def break_even(in_features: int, out_features: int) -> int:
    """The rank from which two factors hold no fewer numbers than the matrix itself: ⌈in·out / (in + out)⌉."""
    return -(-in_features * out_features // (in_features + out_features))


def rank_for(keep: float, in_features: int, out_features: int) -> int:
    """The rank whose factors hold at most `keep` times the matrix's numbers: ⌊keep·in·out / (in + out)⌋, at least 1."""
    return max(1, int(keep * in_features * out_features / (in_features + out_features)))
