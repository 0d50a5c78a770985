"""Fold a LoRA adapter into its base model: a plain Hugging Face folder comes out.

    python apps/merge_lora.py checkpoint.model_name_or_path=BASE lora.adapter=DIR output_dir=OUT

W' = W + alpha/r · B A is summed in float32 and rounded once to the dtype of the weights. The adapter is a folder in
PEFT's format: a run's `adapter/`, or anybody's plain LoRA.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if not __package__:  # started as a file: make the repository importable from wherever we were started
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from apps.training.cli import run_main
from apps.training.config import parse_dataclass
from apps.training.config_schema import setting
from apps.training.files import require_writable
from apps.training.progress import Progress
from backends.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    model_name_or_path: str = setting(help="folder with the base model")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    adapter: str = setting(help="adapter folder in PEFT's format")


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Fold a LoRA adapter into its base model."""

    checkpoint: CheckpointSettings
    lora: AdapterSettings
    output_dir: str = setting(help="a new folder, for the merged model")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = setting("auto", "auto: the dtype of the base's weights")


def merge(argv: Sequence[str]) -> None:
    """Read the settings, load both, write the merged model with the base's tokenizer."""
    settings = parse_dataclass(MergeSettings, argv, program="merge_lora.py")
    base, output = Path(settings.checkpoint.model_name_or_path).expanduser(), Path(settings.output_dir).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output_dir={output} is not empty. Expected a new folder.")
    require_writable(output, "output_dir")

    import modelzoo
    from apps.training.lora import add_adapter
    from backends.lora import merge_lora
    from modelzoo.adapter_files import open_adapter
    from modelzoo.checkpoint_writing import TOKENIZER_FILES

    adapter = open_adapter(settings.lora.adapter)
    with Progress(None, "Loading", "bytes") as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done - progress.done)

        dtype = None if settings.dtype == "auto" else settings.dtype
        model = modelzoo.load_model(base, modelzoo.load_config(model_name_or_path=base), dtype=dtype, progress=show)
    add_adapter(model, adapter, train_norms=bool(adapter.others))
    layers = merge_lora(model)
    has_tokenizer = any((base / name).is_file() for name in TOKENIZER_FILES)
    modelzoo.save_model(model, output, tokenizer=base if has_tokenizer else None)
    print(f"Merged rank {adapter.r} into {len(layers)} layers. Checkpoint saved at {output}/")


def main() -> int:
    """Entry point: exit code 2 and one line for a user's mistake."""
    return run_main(merge)


if __name__ == "__main__":
    sys.exit(main())
