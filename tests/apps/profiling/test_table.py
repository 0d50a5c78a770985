"""Speeds and floors of a table, by numbers one can work out in the head."""

import re
from pathlib import Path

from apps.profiling.names import BETWEEN, COLLECTIVES
from apps.profiling.table import caption, profile_table, region_floors, short_name, traffic
from apps.profiling.trace import Part, Profile
from apps.training.floor import Floor
from compiled.artifact import Artifact
from compiled.regions import RegionSpec, TensorSpec

VECTOR = TensorSpec("x", (250_000,), "float32", (1,))  # a million bytes
SPECS = {
    "forward": RegionSpec("forward", [VECTOR], [VECTOR], flops=10**9),
    "backward": RegionSpec("backward", [VECTOR], [VECTOR], flops=2 * 10**9),
    "head": RegionSpec("head", [VECTOR], [], flops=10**9),
    "update": RegionSpec("update", [VECTOR], [], mutated=["x"]),
}
SCHEDULE = {
    "blocks": [{"forward": "forward", "backward": "backward"}] * 2,
    "head": {"train": "head", "chunks": 4},
}
FLOOR = Floor(
    device="CPU",
    forward=[0.01, 0.01],
    backward=[0.02, 0.02],
    head=0.004,
    teacher=0.0,
    update=0.0005,
    product_flops_per_second=1e12,
    copy_bytes_per_second=1e9,
)


def table(*parts: Part, floor: Floor | None = FLOOR) -> dict[str, str]:
    """Each row's cells behind its name."""
    manifest = {"regions": {name: spec.to_json() for name, spec in SPECS.items()}, "schedule": SCHEDULE}
    idle = 0.1 - sum(part.seconds for part in parts)
    text = profile_table(Profile(0.1, idle, list(parts), True), Artifact(Path("x"), manifest), floor, 2)
    cells = [re.split("  +", line) for line in text.splitlines()]
    return {name: " ".join(rest) for name, *rest in cells}


def test_a_regions_floor_is_its_products_or_its_bytes() -> None:
    assert traffic(SPECS["update"]) == 2 * traffic(SPECS["head"]) == 2_000_000
    floors = region_floors(SCHEDULE, SPECS, FLOOR)
    assert floors == {"forward": 0.01, "backward": 0.02, "head": 0.001, "update": 0.002}


def test_a_row_has_speeds_shares_and_kernels() -> None:
    forward = Part("forward", 2, 0.04, 0.04, {"void at::native::mm<float>(x)": 0.03, "b": 0.008, "c": 0.002})
    rows = table(forward, Part(BETWEEN, 0, 0.01, 0.01), Part(COLLECTIVES, 3, 0.002, 0.02, {"nccl": 0.02}))
    assert rows["forward"] == "2 40.000 40.0% 50 G 100 M 50.0% mm 75%, b 20%"
    assert rows["between regions"] == "10.000 10.0%"
    assert rows["collectives (20.000 in all)"] == "3 2.000 2.0% nccl 100%"
    assert rows["no kernel runs"] == "48.000 48.0%"
    assert rows["step"] == "100.000 100.0% 20 G 64.5%"


def test_without_a_floor_there_are_speeds() -> None:
    rows = table(Part("update", 1, 0.01, 0.01), floor=None)
    assert rows["update"] == "1 10.000 10.0% 200 M"
    assert "No floors" in caption(None, on_gpu=True)
    assert "(1 TFLOP/s" in caption(FLOOR, on_gpu=False)


def test_kernels_are_called_by_what_a_reader_knows_them_by() -> None:
    gemm = "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN"
    assert short_name(gemm) == gemm
    long = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>(int, std::array)"
    assert short_name(long) == "vectorized_elementwise_kernel"
    assert short_name("aten::mm") == "aten::mm"
    assert len(short_name("triton_red_fused_" + "mul_" * 30)) == 44
