"""Compress a model: two thin matrices in place of each linear layer of its blocks, made for the data it reads.

    python apps/compress_llm.py checkpoint.model_name_or_path=outputs/demo/run compress.keep=0.6 output_dir=outputs/low
    python apps/compress_llm.py checkpoint.model_name_or_path=DIR compress.ranks='{q_proj: 64}' output_dir=OUT
    python apps/compress_llm.py checkpoint.model_name_or_path=outputs/low output_dir=outputs/plain --expand
    python apps/compress_llm.py --help

What comes out is a checkpoint that train_llm.py, generate_text.py and compare_backends.py take as they take any other,
beside compression.csv and compression.png. `--expand` multiplies the matrices of such a checkpoint back into plain
weights, for programs that know no low rank. Several workers (`mpirun -np N`) share the calibration data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file: make the repository importable from wherever we were started
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from apps.compression.settings import CompressSettings
from apps.training.cli import run_main
from apps.training.config import parse_dataclass
from apps.training.files import require_writable
from apps.training.progress import Progress
from apps.training.workers.launch import find_launch, own_gpu
from backends.errors import UserError

if TYPE_CHECKING:
    import torch

    from apps.training.workers.group import Workers


def program(argv: Sequence[str]) -> None:
    """Settings first: a mistake in them is answered before PyTorch is imported."""
    given = ["expand=true" if argument == "--expand" else argument for argument in argv]
    settings = parse_dataclass(CompressSettings, given, program="compress_llm.py")
    output = Path(settings.output_dir).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output_dir={output} is not empty. Expected a new folder.")
    require_writable(output, "output_dir")
    launch = own_gpu(find_launch())

    import torch

    from apps.training.devices import choose_device
    from apps.training.workers.group import open_workers

    device = torch.device(choose_device(settings.device))
    timeout = settings.worker_timeout
    with open_workers(launch, device_type=device.type, timeout=timeout, setting="worker_timeout") as workers:
        if settings.expand:
            expand(settings, output, workers)
        else:
            compress(settings, output, workers, device)


def compress(settings: CompressSettings, output: Path, workers: Workers, device: torch.device) -> None:
    """Load, take the perplexity, compress, take it again, save."""
    import modelzoo
    from apps.compression.calibration import calibration_batches, find_data, perplexity, require_positions
    from apps.compression.learning import Learning
    from apps.compression.passes import Passes
    from apps.compression.report import CSV, PICTURE, layer_table, summary, write_csv, write_picture
    from modelzoo.compression import compress_model

    config = modelzoo.load_config(model_name_or_path=settings.checkpoint.model_name_or_path)
    require_positions(settings, config)
    dataset = find_data(settings, config.vocab_size, workers)  # a mistake in it is answered before weights are loaded
    model = load(settings, device)
    batches = calibration_batches(dataset, settings, workers, device)
    tokens = len(batches) * settings.batch_size * settings.max_seq_length * workers.world_size
    all_of_it = ", all that its full batches hold" if tokens < settings.compress.tokens else ""
    print(f"Calibration: {tokens:,} tokens of {dataset.folder}{all_of_it}", flush=True)
    if settings.evaluate and workers.is_first:
        before = perplexity(model, dataset, settings, workers, device, "Perplexity before")
    chosen = settings.compress
    learning = Learning(model, batches, settings) if chosen.method == "mimic_gd" else None
    if learning is not None and workers.world_size > 1:
        raise UserError(
            "compress.method=mimic_gd learns in one process. Start one worker, or use compress.method=mimic."
        )
    with Passes(workers, settings.progress) as passes:

        def sum_(tensor: torch.Tensor) -> torch.Tensor:
            workers.waiting("waiting for the others' moments")
            total = workers.sum_(tensor)
            workers.doing("compressing")
            return total

        reports = compress_model(
            model,
            batches,
            method="svd" if learning is not None else chosen.method,
            keep=chosen.keep,
            ranks=chosen.ranks,
            allocation=chosen.allocation,
            match=chosen.match,
            inputs=chosen.inputs,
            targets=chosen.targets,
            weighting=chosen.weighting,
            learned=learning,
            sum_=sum_,
            on_pass=passes,
        )
    if not workers.is_first:
        return
    with workers.busy("saving the model"):
        save(model, settings, output)
    title = f"{Path(settings.checkpoint.model_name_or_path).resolve().name}: {chosen.method}"
    write_csv(output / CSV, reports, predicts=chosen.method in ("svd_llm", "mimic"))
    write_picture(output / PICTURE, reports, title)
    if learning is not None:
        learning.save(output)
    print(layer_table(reports))
    for line in summary(reports):
        print(line)
    print(f"Checkpoint saved at {output}/ (with {CSV}, {PICTURE})")
    if settings.evaluate:  # what was made is safe by now
        after = perplexity(model, dataset, settings, workers, device, "Perplexity after")
        print(f"Perplexity before: {before:.4f}\nPerplexity after: {after:.4f}")


def expand(settings: CompressSettings, output: Path, workers: Workers) -> None:
    """Load, multiply, save: on the CPU, by the first worker."""
    if not workers.is_first:
        return
    import torch

    from modelzoo.compression import expand_model

    model = load(settings, torch.device("cpu"))
    layers = expand_model(model)
    save(model, settings, output)
    print(f"Expanded {len(layers)} layers. Checkpoint saved at {output}/")


def load(settings: CompressSettings, device: torch.device) -> Any:
    """The model, in evaluation mode, with each layer as its checkpoint tells."""
    import modelzoo

    folder = settings.checkpoint.model_name_or_path
    config = modelzoo.load_config(model_name_or_path=folder)
    dtype = None if settings.dtype == "auto" else settings.dtype
    with Progress(None, f"Loading {folder}", "bytes", mode=settings.progress) as progress:
        return modelzoo.load_model(folder, config, device=device, dtype=dtype, progress=progress.show)


def save(model: Any, settings: CompressSettings, output: Path) -> None:
    """With the tokenizer of the model it was made from."""
    import modelzoo
    from modelzoo.checkpoint_writing import TOKENIZER_FILES

    base = Path(settings.checkpoint.model_name_or_path).expanduser()
    has_tokenizer = any((base / name).is_file() for name in TOKENIZER_FILES)
    modelzoo.save_model(model, output, tokenizer=base if has_tokenizer else None)


def main() -> int:
    """Entry point: exit code 2 and one line for a user's mistake."""
    return run_main(program, many_workers=True)


if __name__ == "__main__":
    sys.exit(main())
