"""Compare backends on one model and one dataset: where errors arise, what they do to predictions, what they cost.

    python apps/compare_backends.py checkpoint.model_name_or_path=outputs/runs/default backends='[dense, optical]'
    python apps/compare_backends.py checkpoint.config_name=demo \\
        backends='[dense, {use: optical, q_levels: 64}, {rules_file: optical-mlp-only.yaml}]'
    python apps/compare_backends.py checkpoint.config_name=demo \\
        backends='[dense, {name: down only, rules: [{match: "*.down_proj", use: optical}]}]'
    python apps/compare_backends.py checkpoint.config_name=demo targets='[eager, inductor, mlir]'
    python apps/compare_backends.py --help

The first entry is the reference. Of every layer: relative error and SNR of its output and gradients when it is fed with
what the reference fed its own, and the error it ends up with in the whole model. Of every backend: KL of the logits and
perplexity on the dev split, time, memory, energy by the backend's own model. All on the same weights and batches.

With `targets` one backend is computed by several compilers: losses of as many steps as there are batches, gradients of
the first, the weights at the end, the time of a step; in targets.csv and targets_gradients.csv.

Tables go to the screen; parity.csv, parity_summary.csv, parity.png, parity.html and config.yaml to `output_dir`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file: make the repository importable from wherever we were started
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from apps.parity.entries import Entry, read_entries
from apps.parity.settings import CompareSettings
from apps.parity.target_entries import read_targets
from apps.training.cli import run_main
from apps.training.config import parse_dataclass, to_yaml
from apps.training.files import atomic_path, require_writable
from backends.errors import UserError

if TYPE_CHECKING:
    from apps.parity.results import VariantResult

FILES = ("parity.csv", "parity_summary.csv", "parity.png", "parity.html", "config.yaml")
FILES_OF_TARGETS = ("targets.csv", "targets_gradients.csv")


def program(argv: Sequence[str]) -> None:
    """Settings first: a mistake in them is answered before PyTorch is imported."""
    settings = parse_dataclass(CompareSettings, argv, program="compare_backends.py")
    entries = read_entries(settings.backends, at_least=1 if settings.targets else 2)
    targets = read_targets(settings.targets) if settings.targets else []
    output = Path(settings.output_dir)
    require_free(output, overwrite=settings.overwrite)
    if targets:
        from apps.parity.target_report import compare_targets

        require_one(entries)
        compare_targets(settings, targets, entries[0])
        return

    import torch

    from apps.parity.batches import Batches, find_dataset
    from apps.parity.comparing import compare, ready
    from apps.parity.tables import all_tables
    from apps.parity.variants import load_model, plan_variants, read_config
    from apps.training.devices import choose_device, describe

    # What is compared: variants of one model. Nothing is loaded yet, and what is wrong with a rule is known now.
    model_config = read_config(settings)
    variants = plan_variants(entries, model_config, settings)
    for variant in variants:
        print(f"{variant.name}\n{variant.routing.table()}\n")

    # The data and the weights, the same for all.
    device = torch.device(choose_device(settings.device))
    batches = Batches(find_dataset(settings, model_config.vocab_size), settings, device)
    weights = load_model(settings, model_config, device)
    print(f"Device: {describe(device)}; dtypes: {settings.precision.table()}")
    print(f"Dataset: {batches.description()}\n", flush=True)

    # The reference stays; the others come one at a time, each on the same memory for its weights.
    results = []
    try:
        reference = variants[0], ready(variants[0], weights, batches, settings)
        for variant in variants[1:]:
            other = variant, ready(variant, weights, batches, settings)
            of_reference, of_other = compare(reference, other, batches, settings)
            results.append(of_other)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{reason} Lower batch_size or model.max_seq_length, or use model.dtype=bfloat16.") from error
    for table in all_tables(of_reference, results):
        print(f"{table.text()}\n")
    facts = {
        "parameters": f"{sum(weight.numel() for weight in weights.parameters()):,}",
        "layers": f"{len(results[0].layers)}",
        "counted dev tokens": f"{of_reference.evaluation.num_counted:,}",
        "device": describe(device),
    }
    save(output, of_reference, results, settings, facts, batches.description())


def require_one(entries: Sequence[Entry]) -> None:
    """UserError where several backends are given beside targets: either the backend or the target differs."""
    if len(entries) > 1:
        raise UserError(
            f"targets compares ways to compute one step, and backends has {len(entries)} entries. Give one, which all "
            "targets compute: backends='[optical]'."
        )


def require_free(output: Path, *, overwrite: bool) -> None:
    """UserError when a report lies in `output` (unless `overwrite`), or nothing can be written there."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir={output} is a file. Expected a folder, or a name that is free.")
    taken = [name for name in (*FILES, *FILES_OF_TARGETS) if (output / name).exists()]
    if taken and not overwrite:
        raise UserError(
            f"output_dir={output} holds a report or a run ({', '.join(taken)}). Choose another folder, or replace it "
            "with overwrite=true."
        )
    require_writable(output, "output_dir")


def save(
    output: Path,
    reference: VariantResult,
    others: Sequence[VariantResult],
    settings: CompareSettings,
    facts: dict[str, str],
    data: str,
) -> None:
    """Write the files, each complete or not at all, and say where they lie."""
    from apps.parity.csv_files import write_layers, write_summary
    from apps.parity.page import ParityPage, render
    from apps.parity.plot import write_plot

    model = Path(str(settings.checkpoint.config_name or settings.checkpoint.model_name_or_path)).resolve().name
    title = f"{model}: errors against {reference.name}"
    write_layers(output / "parity.csv", others)
    write_summary(output / "parity_summary.csv", [reference, *others])
    write_plot(output / "parity.png", others, title=title)
    page = render(ParityPage(title, data, facts, reference, others, to_yaml(settings)))
    for name, text in (("parity.html", page), ("config.yaml", to_yaml(settings))):
        with atomic_path(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"Report saved at {output}/ ({', '.join(FILES)})")


def main() -> int:
    return run_main(program)


if __name__ == "__main__":
    sys.exit(main())
