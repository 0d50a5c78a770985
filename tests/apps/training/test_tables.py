"""The table a user reads."""

from apps.training.tables import text_table


def test_columns_are_as_wide_as_their_widest_cell_and_long_cells_are_cut() -> None:
    lines = text_table(("field", "stored"), [("a", 1), ("longer name", "x" * 100)]).splitlines()
    assert lines == ["  field       | stored", "  a           | 1", f"  longer name | {'x' * 59}…"]
