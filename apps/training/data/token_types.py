"""What a token is; the numbers stored in `token_type_ids`. The loss counts all but padding as targets."""

from enum import IntEnum


class TokenType(IntEnum):
    """Numbers of the generative_data_prep layout."""

    PROMPT = 0
    COMPLETION = 1
    PADDING = 2
    SEPARATOR = 3  # the EOS that ends an article
