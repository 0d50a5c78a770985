"""Where articles come from: `input=` as a person gives it → a Source that can be read several times.

| input | read as |
|---|---|
| corpus | the embedded corpus (corpus.py) |
| a .jsonl or .ndjson file | one record a line |
| a .parquet, .json, .csv, .tsv or .arrow file | one record a row |
| any other file | one document of UTF-8 text |
| a folder, or a pattern such as 'texts/*.md' | every file in it, as above, sorted by name |
| a folder written by `save_to_disk`, a name on the Hugging Face hub | one record a row |

Records may have any shape that articles.py knows. A mistake in one is a UserError that names file and line.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.training.data import corpus
from apps.training.data.articles import Piece, Style, article, text_segments
from apps.training.data.hub import asking_the_hub
from backends.errors import UserError, did_you_mean, unknown

# A longer text is handed on in parts cut at a line's end, so that memory stays bounded. A tokenizer may split white
# space differently at such a cut, once in a million characters.
PIECE_CHARACTERS = 2**20
_TABLES = {".json": "json", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}  # suffix → a builder of `datasets`
_LINES = (".jsonl", ".ndjson")
_SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves


@dataclass(frozen=True)
class Source:
    """Articles that can be read again and again. `files`: name and path of each file they come from, if any.

    `left_out`: files that are not UTF-8 text.
    """

    name: str
    files: tuple[tuple[str, Path], ...]
    pieces: Callable[[], Iterator[Piece]]
    left_out: tuple[Path, ...] = ()

    @property
    def num_bytes(self) -> int | None:
        """About how much text there is; None where the files do not tell."""
        plain = self.files and not any(path.suffix in (".parquet", *_TABLES) for _, path in self.files)
        return sum(path.stat().st_size for _, path in self.files) if plain else None


def open_source(
    given: str, style: Style, *, split: str = "train", subset: str | None = None, skips_undecodable: bool = False
) -> Source:
    """Find what `given` names. Reads nothing yet but folders' listings; UserError when there is no such thing.

    `skips_undecodable`: read all text files through once, and leave out those that are not UTF-8.
    """
    source = _find(given, style, split, subset)
    if not skips_undecodable or not source.files:
        return source
    kept = tuple((name, path) for name, path in source.files if _is_decodable(path))
    left_out = tuple(sorted({path for _, path in source.files} - {path for _, path in kept}))
    if not kept:
        raise UserError(f"No file of input={given} is UTF-8 text. Convert them; the first is '{left_out[0]}'.")
    return Source(source.name, kept, lambda: _pieces([path for _, path in kept], style), left_out)


def _find(given: str, style: Style, split: str, subset: str | None) -> Source:
    path = Path(given)
    if given == corpus.NAME:
        return _files_source(given, corpus.folder(), corpus.files(), style)
    if path.is_dir() and any((path / name).exists() for name in _SAVED):
        return Source(path.name, (), lambda: _rows(_load_saved(path, split), given, style))
    if path.is_dir():
        found = sorted((p for p in path.rglob("*") if p.is_file() and not _hidden(p, path)), key=Path.as_posix)
        if not found:
            raise UserError(f"The folder '{given}' holds no files. Expected text, jsonl or parquet files in it.")
        return _files_source(path.resolve().name, path, found, style)
    if path.is_file():
        return _files_source(path.name, path.parent, [path], style)
    matched = [Path(name) for name in sorted(glob.glob(given, recursive=True)) if Path(name).is_file()]
    if matched:
        return _files_source(given, Path(os.path.commonpath([path.parent for path in matched])), matched, style)
    dataset = _load_from_hub(given, split, subset)
    return Source(given, (), lambda: _rows(dataset, given, style))


def _files_source(name: str, root: Path, paths: list[Path], style: Style) -> Source:
    files = tuple((path.relative_to(root).as_posix(), path) for path in paths)
    return Source(name, files, lambda: _pieces(paths, style))


def _pieces(paths: Iterable[Path], style: Style) -> Iterator[Piece]:
    for path in paths:
        yield from _file_pieces(path, style)


def _is_decodable(path: Path) -> bool:
    """Whether a file is UTF-8 text, or a kind that has an encoding of its own. UserError where it cannot be read."""
    if path.suffix in (".parquet", *_TABLES):
        return True
    try:
        with path.open(encoding="utf-8-sig") as file:
            while file.read(PIECE_CHARACTERS):
                pass
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror or error}.") from error
    return True


def _file_pieces(path: Path, style: Style) -> Iterator[Piece]:
    try:
        if path.suffix in _LINES:
            yield from _json_lines(path, style)
        elif path.suffix == ".parquet":
            yield from _parquet_rows(path, style)
        elif path.suffix in _TABLES:
            yield from _rows(_load_table(path), str(path), style)
        else:
            yield from _text_pieces(path)
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is not UTF-8 text (byte {error.start}). Convert it, or set skip_undecodable=true to leave out "
            "all such files."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror or error}.") from error


def _text_pieces(path: Path) -> Iterator[Piece]:
    """A text file as one article, in parts when it is long."""
    with path.open(encoding="utf-8-sig") as file:
        first, text = True, _whole_lines(file)
        while text:
            following = _whole_lines(file)
            yield Piece(text_segments(text, end=not following), first, last=not following)
            first, text = False, following


def _whole_lines(file: Any) -> str:
    text = file.read(PIECE_CHARACTERS)
    return text + file.readline(PIECE_CHARACTERS) if len(text) == PIECE_CHARACTERS else text


def _json_lines(path: Path, style: Style) -> Iterator[Piece]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                record = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}:{number}: not JSON ({error.msg} at column {error.colno}). Mend the line."
                ) from None
            except (ValueError, RecursionError) as error:  # more digits, or deeper, than Python reads
                raise UserError(f"{path}:{number}: not readable ({str(error).split(';')[0]}). Mend the line.") from None
            yield from _record_piece(record, f"{path}:{number}", style)


def _parquet_rows(path: Path, style: Style) -> Iterator[Piece]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield from _record_piece(record, f"{path}:{number}", style)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"'{path}' is not a whole parquet file ({str(error).splitlines()[0]}).") from error


def _rows(dataset: Any, name: str, style: Style) -> Iterator[Piece]:
    for number, record in enumerate(dataset, start=1):
        yield from _record_piece(record, f"{name}:{number}", style)


def _record_piece(record: Any, origin: str, style: Style) -> Iterator[Piece]:
    """One record as one piece; nothing when it holds nothing to learn."""
    if isinstance(record, dict):
        record = {key: value for key, value in record.items() if value is not None}  # tables fill absent keys with null
    try:
        segments = article(record, style)
    except ValueError as error:
        raise UserError(f"{origin}: {error}.") from None
    if segments:
        yield Piece(segments)


def _load_saved(path: Path, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # files that lack, are cut short, or of another program
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{path}' holds {' or '.join(_SAVED)}, but cannot be read as a dataset that save_to_disk wrote "
            f"({reason}). Give its files by a pattern such as 'FOLDER/*.jsonl', or save it again."
        ) from error
    return _one_split(loaded, split, str(path))


def _load_table(path: Path) -> Any:
    import datasets

    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        return datasets.load_dataset(_TABLES[path.suffix], data_files=str(path), split="train", **options)
    except Exception as error:  # each builder has errors of its own
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"'{path}' cannot be read as a {path.suffix[1:]} table ({reason}).") from error


def _load_from_hub(name: str, split: str, subset: str | None) -> Any:
    near = did_you_mean(Path(name).name, [path.name for path in Path(name).parent.glob("*")])
    missing = f"There is no file, folder or pattern '{name}'.{near}"
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix in (*_LINES, *_TABLES, ".parquet"):
        raise UserError(f"{missing} Expected a path, a Hugging Face dataset or '{corpus.NAME}'.")
    import datasets

    try:
        with asking_the_hub(name):
            loaded = datasets.load_dataset(name, subset)
    except Exception as error:  # the hub, its cache and every builder have errors of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{missing} As a Hugging Face dataset it cannot be loaded either: {reason}") from error
    return _one_split(loaded, split, name)


def _one_split(loaded: Any, split: str, name: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise unknown(f"split of '{name}'", split, loaded)
    return loaded[split]


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
