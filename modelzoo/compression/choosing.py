"""Which layers are compressed, in which blocks, and the ranks that were named for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from backends.errors import UserError
from backends.layers import BackendLinear
from backends.lora import matching_linears, names_layer
from modelzoo.compression.allocation import LayerShape


def blocks_of(model: nn.Module, layers: Collection[str] | None = None) -> dict[str, nn.Module]:
    """The blocks that are compressed, by path: those of the longest row that holds one of `layers` (None: any linear).

    UserError for a model without such a row.
    """
    rows = {
        path: row
        for path, row in _rows(model).items()
        if layers is None or any(name.startswith(f"{path}.") for name in layers)
    }
    if not rows:
        raise UserError(f"{type(model).__name__} has no nn.ModuleList of blocks with linear layers to compress.")
    path = max(rows, key=lambda path: len(rows[path]))
    return {f"{path}.{index}": block for index, block in enumerate(rows[path])}


def chosen_layers(
    model: nn.Module, match: str | Sequence[str] | None
) -> tuple[dict[str, nn.Module], dict[str, nn.Linear]]:
    """The row of blocks and the linear layers in it that `match` names (None: all), each by name.

    UserError for a layer that is named and not in the row, and for one that is compressed already.
    """
    named = matching_linears(model, match, "Compression")
    if match is not None:
        _require_rows(model, named)
    blocks = blocks_of(model, named)
    layers = {name: layer for name, layer in named.items() if name.startswith(tuple(f"{path}." for path in blocks))}
    if len(layers) < len(named) and match is not None:
        outside = next(name for name in named if name not in layers)
        row = next(iter(blocks)).rpartition(".")[0]
        raise UserError(
            f"Layer '{outside}' is not in '{row}', the longest row of blocks that was named, and one row is compressed "
            "at a time. Leave it out, or name layers of its row alone."
        )
    for name, layer in layers.items():
        if isinstance(layer, BackendLinear) and (layer.stored is not None or layer.lora_alpha is not None):
            what = "a low-rank update (LoRA)" if layer.stored is None else f"{', '.join(layer.stored)} already"
            raise UserError(f"Layer '{name}' stores {what}. Compress the dense checkpoint it came from.")
    return blocks, layers


def ranks_by_layer(shapes: Mapping[str, LayerShape], ranks: Mapping[str, int]) -> dict[str, int]:
    """The rank of each layer, of the most specific pattern that names it; UserError for one that it cannot have."""
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        pattern = max((each for each in ranks if names_layer(each, name)), key=lambda each: _specificity(each, name))
        rank, limit = ranks[pattern], min(shape.in_features, shape.out_features)
        if not isinstance(rank, int) or not 1 <= rank <= limit:
            raise UserError(f"compress.ranks gives layer '{name}' rank {rank}. Expected 1 to {limit}, a whole number.")
        found[name] = rank
    return found


def _rows(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of modules that all hold linear layers, by path; not those inside a block of another row (experts)."""
    rows = {
        path: part
        for path, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and all(_has_linear(block) for block in part) and len(part)
    }
    outer = [path for path, row in rows.items() if len(row) > 1]
    return {path: row for path, row in rows.items() if not any(path.startswith(f"{other}.") for other in outer)}


def _require_rows(model: nn.Module, layers: Collection[str]) -> None:
    rows = _rows(model)
    for name in layers:
        if rows and not any(name.startswith(f"{path}.") for path in rows):
            raise UserError(
                f"Layer '{name}' is in none of the model's blocks, so it cannot be compressed. Leave it out."
            )


def _specificity(pattern: str, layer: str) -> tuple[bool, bool, int]:
    """A full name goes before the end of one, that before a glob, and of two the longer before the shorter."""
    return pattern == layer, layer.endswith(f".{pattern}"), len(pattern)


def _has_linear(block: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear) for part in block.modules())
