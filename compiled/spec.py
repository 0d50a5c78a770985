"""What a train step is compiled for. Two runs with equal specs can share an artifact; any difference here changes the
graph.

Settings that are not here (rates, betas, weight decay, clipping, schedule, seed, steps, data, accumulation, workers)
enter the compiled step as tensors or happen between regions, so one artifact serves them all.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 5

# What a compiler may use of a CPU; the rest of /proc/cpuinfo's flags never reaches generated code.
_ISA_PREFIXES = (
    "sse",
    "ssse",
    "avx",
    "amx",
    "fma",
    "f16c",
    "bmi",
    "popcnt",
    "abm",
    "movbe",
    "vaes",
    "gfni",
    "adx",
    "sha",
)


@dataclass(frozen=True)
class StepSpec:
    """Every field that changes the graph or the machine code.

    model: the model's shape as plain data; routing: layers and source fingerprint by backend; precision:
    dtype names; optimizer: kind, source fingerprint; device: kind and capability (see `describe_device`); versions:
    torch, triton, schema.
    """

    model_name: str
    model: dict[str, Any]
    routing: dict[str, Any]
    batch_size: int
    max_seq_length: int
    precision: dict[str, str]
    article_attention: bool
    head_chunks: int
    optimizer: dict[str, Any]
    device: dict[str, Any]
    versions: dict[str, str]
    activations: str = "all"  # what a block keeps for its backward; dear: what a pass over memory does not make again
    deterministic: bool = True  # every run gives the same bits; on a CPU always
    lora: dict[str, Any] = field(default_factory=dict)  # rank, alpha, layers and norms; empty: every weight is trained
    skips_nonfinite: bool = False  # the update can be told to leave everything as it is
    loss_terms: list[str] = field(default_factory=list)  # what is minimised beside cross entropy: objective.TERMS
    teacher: dict[str, Any] = field(default_factory=dict)  # the shape of the model whose predictions are learned too
    target: dict[str, Any] = field(default_factory=dict)  # {} machine code by Inductor; else kind (mlir), dialect, …

    def to_json(self) -> dict[str, Any]:
        # through JSON once, so that a spec just made compares equal to one read from a file
        return json.loads(json.dumps(asdict(self)))

    @property
    def key(self) -> str:
        """Short hash of every field but the model's display name."""
        fields = {name: value for name, value in self.to_json().items() if name != "model_name"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def file_name(self) -> str:
        shape = f"b{self.batch_size}x{self.max_seq_length}"
        return f"{self.model_name}-{shape}-{self.precision['parameters']}-{self.device['kind']}-{self.key}.substrate"


@dataclass(frozen=True)
class FieldDifference:
    """One field in which an artifact and a run differ."""

    field: str
    artifact: Any
    run: Any


def difference(artifact: dict[str, Any], run: dict[str, Any]) -> list[FieldDifference]:
    """The fields in which two specs (as JSON) differ; a CPU artifact fits any CPU with the features it was made for."""
    found = []
    left, right = flatten(artifact), flatten(run)
    for name in sorted(left.keys() | right.keys()):
        ours, theirs = left.get(name, "–"), right.get(name, "–")
        if name == "model_name" or ours == theirs:
            continue
        if name == "device.isa" and isinstance(ours, list) and isinstance(theirs, list):
            missing = sorted(set(ours) - set(theirs))
            if missing:
                found.append(FieldDifference(name, f"needs {' '.join(missing)}", "not on this CPU"))
            continue
        found.append(FieldDifference(name, ours, theirs))
    return found


def difference_table(differences: list[FieldDifference]) -> str:
    """The table a user reads: field, artifact, this run."""
    rows = [("field", "artifact", "this run")]
    rows += [(entry.field, _short(entry.artifact), _short(entry.run)) for entry in differences]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def describe_device(kind: str) -> dict[str, Any]:
    """What machine code for this machine's `kind` ("cpu" or "cuda") depends on."""
    if kind == "cuda":
        import torch

        return {"kind": "cuda", "capability": list(torch.cuda.get_device_capability())}
    return {"kind": "cpu", "isa": cpu_features(), "float32_products": float32_library()}


def float32_library() -> str:
    """Which library computes float32 products on this CPU: "onednn", or the "default" that PyTorch takes (MKL).

    oneDNN where it is known to be the faster: on a processor with AVX-512 that is not Intel's. A rule, not a
    measurement: two compiles for one machine must give the same numbers.
    """
    import torch

    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    maker = _cpu_field("vendor_id")
    return "onednn" if both and maker not in ("", "GenuineIntel") and "avx512f" in cpu_features() else "default"


def cpu_features() -> list[str]:
    """This CPU's instruction sets a compiler may use, sorted; empty where the system does not list them."""
    flags = set(_cpu_field("flags", "Features").split())
    return sorted(flag for flag in flags if flag.startswith(_ISA_PREFIXES))


def _cpu_field(*names: str) -> str:
    """What /proc/cpuinfo says of the first CPU under one of `names`; empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() in names), "")


def describe_versions(kind: str) -> dict[str, str]:
    """Versions whose change makes an artifact unusable."""
    import importlib.metadata

    versions = {"schema": str(SCHEMA_VERSION), "torch": importlib.metadata.version("torch")}
    if kind == "cuda":
        versions["triton"] = importlib.metadata.version("triton")
        versions["python"] = ".".join(platform.python_version_tuple()[:2])  # its bundles hold Python code
    return versions


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted name."""
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
