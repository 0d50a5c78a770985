"""The table of a profile: time, speed and floor of each part of a step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from apps.profiling.names import COLLECTIVES
from apps.profiling.trace import Part, Profile
from apps.training.floor import Floor
from backends.routing_table import count_text, plain_table
from compiled.artifact import Artifact
from compiled.regions import RegionSpec

HEADING = ("region", "calls", "ms", "share", "FLOP/s", "bytes/s", "of floor", "largest kernels")
_LONGEST = 44  # letters of a kernel's name: what is behind them are template arguments


def profile_table(profile: Profile, artifact: Artifact, floor: Floor | None, kernels: int) -> str:
    """A row for each part in the order in which they first run, what is idle, and their sum, the step."""
    specs = artifact.region_specs()
    floors = {} if floor is None else region_floors(artifact.manifest["schedule"], specs, floor)
    rows = [HEADING, *(_row(part, profile, specs, floors, kernels) for part in profile.parts)]
    idle = "no kernel runs" if profile.on_gpu else "between regions, on the host"
    rows.append((idle, "", _ms(profile.idle), _share(profile.idle, profile.seconds), "", "", "", ""))
    flops = sum(specs[part.name].flops * part.calls for part in profile.parts if part.name in specs)
    whole = "" if floor is None else f"{(floor.microbatch + floor.update) / profile.seconds:.1%}"
    rows.append(("step", "", _ms(profile.seconds), "100.0%", _rate(flops, profile.seconds), "", whole, ""))
    return plain_table(rows, right=range(1, 7))


def caption(floor: Floor | None, *, on_gpu: bool) -> str:
    """What the columns mean, with the speeds that the floors stand on."""
    times = (
        "Times are of kernels; where two parts run at once, the region's. No CUDA graph: what is idle here need not be "
        "in a run."
        if on_gpu
        else "Times are the host's. Machine code of a region is one piece: only PyTorch's operators in it have names."
    )
    text = f"{times}\nFLOPs of products and attention; bytes of inputs and outputs, twice what is written in place."
    if floor is None:
        return f"{text}\nNo floors: the step's products did not fit into the device's memory beside each other."
    products, copied = (count_text(each) for each in (floor.product_flops_per_second, floor.copy_bytes_per_second))
    return (
        f"{text}\nFloor of a region: its products and attention alone, by PyTorch's fastest kernels ({products}FLOP/s\n"
        f"in all products of the step), or its bytes as fast as a copy ({copied}B/s), whichever takes longer;\n"
        "of the step: products, attention and the optimizer's bytes."
    )


def region_floors(schedule: Mapping[str, Any], specs: Mapping[str, RegionSpec], floor: Floor) -> dict[str, float]:
    """Seconds that one run of each region takes at the least."""
    products = {name: spec.flops / floor.product_flops_per_second for name, spec in specs.items()}
    for block, forward, backward in zip(schedule["blocks"], floor.forward, floor.backward, strict=True):
        products |= {block["forward"]: forward, block["backward"]: backward}
    products[schedule["head"]["train"]] = floor.head / schedule["head"]["chunks"]
    return {name: max(products[name], traffic(spec) / floor.copy_bytes_per_second) for name, spec in specs.items()}


def traffic(spec: RegionSpec) -> int:
    """Bytes that a region reads and writes: inputs and outputs once, and once more what it writes in place."""
    return spec.bytes + sum(each.bytes for each in spec.inputs if each.name in spec.mutated)


def _row(
    part: Part, profile: Profile, specs: Mapping[str, RegionSpec], floors: Mapping[str, float], kernels: int
) -> tuple[str, ...]:
    spec, name, seconds = specs.get(part.name), part.name, part.seconds
    if name == COLLECTIVES:
        name = f"collectives ({_ms(part.busy)} in all)"
    shares = [(short_name(kernel), taken / part.busy) for kernel, taken in list(part.kernels.items())[:kernels]]
    largest = ", ".join(f"{kernel} {share:.0%}" for kernel, share in shares if share >= 0.01)
    calls = f"{part.calls:g}" if part.calls else ""
    start = (name, calls, _ms(seconds), _share(seconds, profile.seconds))
    if spec is None or seconds == 0:
        return (*start, "", "", "", largest)
    flops, moved = spec.flops * part.calls, traffic(spec) * part.calls
    floor = _share(floors[part.name] * part.calls, seconds) if part.name in floors else ""
    return (*start, _rate(flops, seconds), _rate(moved, seconds), floor, largest)


def short_name(kernel: str) -> str:
    """A kernel's name without return type, namespaces and template arguments."""
    plain = re.sub(r"^void ", "", kernel)
    plain = re.split(r"[<(]", plain)[0].split("::")[-1] if not plain.startswith("aten::") else plain
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 1]}…"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}"


def _rate(count: float, seconds: float) -> str:
    return count_text(count / seconds) if count else ""
