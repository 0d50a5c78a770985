"""The README's table of speeds, measured here: on a machine with a GPU its rows, on any other the CPU's.

    python benchmarks/speed_table.py
    python benchmarks/speed_table.py rows=tinyllama,articles peers=liger steps=6 [any setting of train_llm.py]

Each row is benchmarks/step_speed.py with its settings: our step, each peer that is installed, and the floor, in
processes of their own. Their lines come as they are measured; at the end there is the table, in Markdown. `rows`: of
the names below, or all. A peer that is missing, and a step that does not fit, are rows that say so. What else is
given holds for every row. On one H200 a row takes one to four minutes, of which half is compiling and starting.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import NAMES  # noqa: E402

OWN = {"rows": "", "peers": "", "steps": "12"}
HEADING = ("work", "variant", "tokens/s", "ms a step", "times ours", "MFU", "of floor", "peak GiB")


@dataclass(frozen=True)
class Row:
    """A step: what it is called, its settings, the device it is meant for, and the peers that do the same work."""

    title: str
    settings: str
    kind: str = "cuda"
    peers: tuple[str, ...] = NAMES


BFLOAT16 = "model.dtype=bfloat16 optimizer.moments_dtype=bfloat16 optimizer.master_weights=none"
MASTERS = "model.dtype=bfloat16 optimizer.moments_dtype=bfloat16 optimizer.master_weights=float32"
TINYLLAMA = "checkpoint.config_name=tinyllama-1.1b training.batch_size=8 model.max_seq_length=2048"
LLAMA = (  # as one batch it would not fit without computing blocks again
    "checkpoint.config_name=llama-2-7b training.batch_size=4 training.gradient_accumulation_steps=2 "
    "model.max_seq_length=4096"
)
SPLIT = "model.dtype=bfloat16 optimizer.moments_dtype=bfloat16 optimizer.master_weights=split"
CPU_MODEL = "checkpoint.config_name=benchmarks/cpu_model training.batch_size=4 model.max_seq_length=256"
ROWS = {
    "tinyllama": Row("TinyLlama-1.1B, 8×2048", f"{TINYLLAMA} {BFLOAT16}"),
    "clm-60m": Row(
        "clm-60m, 16×2048",
        f"checkpoint.config_name=clm-60m training.batch_size=16 model.max_seq_length=2048 {BFLOAT16}",
    ),
    "articles": Row(
        "TinyLlama-1.1B, 8×2048, articles of 512 tokens", f"{TINYLLAMA} {BFLOAT16} model.article_attention=true"
    ),
    "long": Row(
        "TinyLlama-1.1B, 1×32768",  # the same model with more positions
        f"checkpoint.config_name=benchmarks/tinyllama_32k training.batch_size=1 model.max_seq_length=32768 {BFLOAT16}",
    ),
    # transformers has no such step; it is compared with ours without masters
    "masters": Row("TinyLlama-1.1B, 8×2048, float32 masters", f"{TINYLLAMA} {MASTERS}", peers=()),
    "llama-2-7b": Row("Llama-2-7B, 2×4×4096", f"{LLAMA} {BFLOAT16}"),
    "llama-2-7b-masters": Row("Llama-2-7B, 2×4×4096, float32 masters (split)", f"{LLAMA} {SPLIT}", peers=()),
    "llama-2-7b-fp8": Row(
        "Llama-2-7B, 2×4×4096, linears in fp8", f"{LLAMA} {BFLOAT16} backend.rules_file=fp8", peers=()
    ),
    "cpu": Row("6 layers of width 384, 4×256, float32", CPU_MODEL, "cpu"),
    "cpu-bfloat16": Row("the same in bfloat16", f"{CPU_MODEL} {BFLOAT16}", "cpu"),
}


def main() -> int:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    own = {name: given.pop(name, default) for name, default in OWN.items()}
    kind = device_kind(given)
    rows = chosen(own["rows"], kind)
    print(heading(kind), flush=True)
    lines = [HEADING, tuple("---" for _ in HEADING)]
    failed = False
    for row in rows:
        peers = chosen_peers(own["peers"], row)
        settings = dict(each.split("=", 1) for each in row.settings.split()) | given
        results = list(measured([f"{key}={value}" for key, value in settings.items()], peers, own["steps"]))
        failed |= not results
        lines += table_lines(row.title, results)
    print("\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return int(failed)


def device_kind(given: dict[str, str]) -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and given.get("compile.arch") != "cpu" else "cpu"


def chosen(names: str, kind: str) -> list[Row]:
    """The rows of these names; without any, those for this kind of device."""
    if not names:
        return [row for row in ROWS.values() if row.kind == kind]
    wanted = list(ROWS) if names == "all" else names.split(",")
    for name in wanted:
        if name not in ROWS:
            sys.exit(f"error: rows={names}: '{name}' is unknown. Expected some of {', '.join(ROWS)}, or all.")
    return [ROWS[name] for name in wanted]


def chosen_peers(names: str, row: Row) -> str:
    """`peers` for step_speed.py: those of the row that were asked for."""
    asked = row.peers if not names else [peer for peer in names.split(",") if peer in row.peers]
    return ",".join(asked) or "none"


def heading(kind: str) -> str:
    """Where and when: device, versions, commit."""
    import torch

    from apps.training.devices import describe

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    device = describe(torch.device(kind))
    return f"{device}, torch {torch.__version__}, commit {commit.stdout.strip() or 'unknown'}, {date.today()}"


def measured(settings: Sequence[str], peers: str, steps: str) -> Iterator[dict[str, Any]]:
    """What step_speed.py says of each variant, printed as it comes; nothing when it fails."""
    command = [sys.executable, str(ROOT / "benchmarks/step_speed.py"), *settings, f"peers={peers}", f"steps={steps}"]
    print(f"\n{' '.join(settings)}", flush=True)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith('{"variant"'):
                print(text, end="", flush=True)
                yield json.loads(text)


def table_lines(title: str, results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of a row's variants."""
    if not results:
        return [(title, "failed, see above", *[""] * (len(HEADING) - 2))]
    lines = []
    for result in results:
        if "left_out" in result:
            cells = (f"{result['variant']}: {result['left_out']}", *[""] * (len(HEADING) - 2))
        else:
            cells = (
                result["variant"],
                f"{result['tokens_per_s']:,}",
                f"{result['median_ms']:.1f}",
                f"{result['times_ours']:.2f}" if "times_ours" in result else "",
                *(f"{result[name]:.1%}" if name in result else "" for name in ("mfu", "of_floor")),
                f"{result['peak_gib']:.1f}" if "peak_gib" in result else "",
            )
        lines.append((title if result is results[0] else "", *cells))
    return lines


if __name__ == "__main__":
    sys.exit(main())
