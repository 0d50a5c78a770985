"""Print what an artifact holds, for a person to read.

    python apps/inspect_artifact.py outputs/artifacts/FILE.substrate
    python apps/inspect_artifact.py FILE region=block_0_forward
    python apps/inspect_artifact.py FILE extract_dir=DIR
    python apps/inspect_artifact.py FILE --mlir DIR [mlir_format=bytecode]

Without a region: what the step was compiled for, which backend computes which layer, its regions, and the schedule that
runs them. With one: its inputs and outputs by name with shape, dtype and stride, and its traced graph. `extract_dir`
writes every member (manifest, graphs, machine code) into a folder. `--mlir` writes the modules of an artifact of
compile.target=mlir, and `modules.json`: every argument and result of each by name, role, dtype and shape. The file is
verified first: a truncated or altered one is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if not __package__:  # started as a file: make the repository importable from wherever we were started
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from apps.training.cli import run_main
from apps.training.config import parse_dataclass
from apps.training.config_schema import setting
from backends.errors import UserError, unknown

if TYPE_CHECKING:
    from compiled.artifact import Artifact


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Print what an artifact holds: inspect_artifact.py FILE [region=NAME] [extract_dir=DIR] [--mlir DIR]."""

    file: str = setting(help="the artifact; `FILE` alone is short for file=FILE")
    region: str | None = setting(None, "show one region: inputs, outputs and graph")
    extract_dir: str | None = setting(None, "write every member of the artifact into this new folder")
    mlir: str | None = setting(None, "write its MLIR modules into this new folder; also written --mlir DIR")
    mlir_format: Literal["text", "bytecode"] = setting("text", "form of the modules; bytecode needs the extra [mlir]")


def program(argv: Sequence[str]) -> int:
    config = parse_dataclass(InspectConfig, with_file(argv), program="inspect_artifact.py")
    from compiled.artifact import open_artifact

    artifact = open_artifact(Path(config.file))
    if config.region is not None:
        print(region_text(artifact, config.region))
    elif config.extract_dir is None and config.mlir is None:
        print(artifact_text(artifact))
    if config.extract_dir is not None:
        extract(artifact, Path(config.extract_dir))
    if config.mlir is not None:
        extract_modules(artifact, Path(config.mlir), as_bytecode=config.mlir_format == "bytecode")
    return 0


def with_file(argv: Sequence[str]) -> list[str]:
    """`FILE` written alone becomes `file=FILE`; a path may hold a "=" when it names an existing file.

    `--mlir DIR` becomes `mlir=DIR`.
    """
    if "--mlir" in argv:
        at = argv.index("--mlir")
        if at + 1 == len(argv):
            raise UserError("--mlir has no folder. Expected inspect_artifact.py FILE --mlir DIR.")
        argv = [*argv[:at], f"mlir={argv[at + 1]}", *argv[at + 2 :]]
    plain = [argument for argument in argv if not argument.startswith("-")]
    bare = [argument for argument in plain if "=" not in argument or Path(argument).is_file()]
    if len(bare) > 1:
        raise UserError(f"Got {len(bare)} files ({', '.join(bare)}). Expected one: inspect_artifact.py FILE.")
    return [f"file={argument}" if argument in bare else argument for argument in argv]


def artifact_text(artifact: Artifact) -> str:
    """The manifest as titled tables."""
    from apps.training.compile_command import region_table
    from backends.routing_table import count_text, plain_table, routed_table
    from compiled.spec import flatten

    manifest = artifact.manifest
    spec = [(name, _shown(value)) for name, value in flatten(artifact.spec).items()]
    cost, blocks = manifest["cost"], len(manifest["cost"]["saved_bytes"])
    facts = [
        ("parameters", f"{manifest['parameters']:,}"),
        ("FLOPs per step", count_text(cost["flops"])),
        ("bytes per step", count_text(cost["bytes"])),
        (
            "activation bytes",
            count_text(cost["hidden_bytes"] + sum(cost["saved_bytes"], cost["hidden_bytes"] * blocks)),
        ),
        ("optimizer state", ", ".join(manifest["optimizer"]["state"])),
        ("runtime numbers", ", ".join(manifest["optimizer"]["hyperparameters"])),
        ("compile seconds", f"{manifest['compile_seconds']}, of which tracing {manifest['trace_seconds']}"),
    ]
    sections = {
        "Compiled for": plain_table([("field", "value"), *spec]),
        "Layers and backends": routed_table(manifest["routing"]),
        "Step": plain_table([("fact", "value"), *facts]),
        "Regions": region_table(artifact),
        "Schedule": schedule_text(artifact),
    }
    return f"Artifact {artifact.path}\n\n" + "\n\n".join(f"{title}\n{table}" for title, table in sections.items())


def schedule_text(artifact: Artifact) -> str:
    """Which region runs when, equal neighbours folded together."""
    from backends.routing_table import plain_table

    schedule = artifact.manifest["schedule"]
    *of_blocks, of_head, of_embed = (group["direct"] or "–" for group in schedule["updates"])
    folded: list[tuple[tuple[str, str, str], list[int]]] = []
    for index, (block, update) in enumerate(zip(schedule["blocks"], of_blocks, strict=True)):
        row = (block["forward"], block["backward"], update)
        if not folded or folded[-1][0] != row:
            folded.append((row, []))
        folded[-1][1].append(index)
    blocks = [(f"block {span[0]}" + (f" … {span[-1]}" if len(span) > 1 else ""), *row) for row, span in folded]
    embed, head = schedule["embed"], schedule["head"]
    return plain_table(
        [
            ("part", "forward", "backward", "update"),
            ("embed", embed["forward"], embed["backward"] or "–", of_embed),
            *blocks,
            ("head", f"{head['train']} × {head['chunks']}", "(the same)", of_head),
        ]
    )


def region_text(artifact: Artifact, name: str) -> str:
    """Inputs and outputs of one region, and its graph."""
    from backends.routing_table import plain_table
    from compiled.artifact import read_member

    regions = artifact.region_specs()
    if name not in regions:
        raise unknown("region", name, regions)
    region = regions[name]
    rows = [("", "name", "dtype", "shape", "stride", "")]
    for kind, specs in (("in", region.inputs), ("out", region.outputs)):
        for spec in specs:
            written = "written in place" if kind == "in" and spec.name in region.mutated else ""
            rows.append((kind, spec.name, spec.dtype, str(list(spec.shape)), str(list(spec.stride)), written))
    graph = read_member(artifact, f"graphs/{name}.txt").decode()
    return f"Region {name}\n{plain_table(rows)}\n\n{graph}"


def extract(artifact: Artifact, folder: Path) -> None:
    """Write every member into a new folder, all or nothing."""
    from apps.training.files import atomic_folder
    from compiled.artifact import read_member

    with atomic_folder(folder) as target:
        for name in ("manifest.json", *artifact.manifest["members"]):
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_member(artifact, name))
    print(f"Extracted {len(artifact.manifest['members']) + 1} files to {folder}")


def extract_modules(artifact: Artifact, folder: Path, *, as_bytecode: bool) -> None:
    """Write every MLIR module and what the manifest says of them into a new folder, all or nothing."""
    import json

    from apps.training.files import atomic_folder
    from compiled.artifact import read_member
    from compiled.mlir.importing import to_bytecode

    if "mlir" not in artifact.manifest:
        raise UserError(f"Artifact {artifact.path} holds no MLIR modules. Compile one with compile.target=mlir.")
    about = artifact.manifest["mlir"]
    with atomic_folder(folder) as target:
        for module in about["modules"].values():
            content = read_member(artifact, module["file"])
            suffix = ".mlirbc" if as_bytecode else ".mlir"
            (target / f"{module['name']}{suffix}").write_bytes(to_bytecode(content) if as_bytecode else content)
        (target / "modules.json").write_text(json.dumps(about, indent=1))
    print(f"Extracted {len(about['modules'])} modules ({about['dialect']}) to {folder}")


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def main() -> int:
    return run_main(program)


if __name__ == "__main__":
    sys.exit(main())
