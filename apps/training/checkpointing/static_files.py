"""The small files that make a folder of weights a Hugging Face checkpoint; the same in every checkpoint of a run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import modelzoo


def static_files(model: Any, tokenizer: Path | None) -> dict[str, bytes]:
    """Name → content: config.json, generation_config.json and the files of the tokenizer in the folder `tokenizer`."""
    with tempfile.TemporaryDirectory() as folder:
        modelzoo.save_configs(model, Path(folder), tokenizer)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
