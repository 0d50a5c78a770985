"""The rules of the house that no reviewer has to remember: who may import whom, what may not be imported early, how
long a file may be. They are read off the source by `ast`; only the start-up tests import anything."""

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("apps", "backends", "compiled", "modelzoo")
MAY_IMPORT = {
    "apps": {"apps", "backends", "compiled", "modelzoo"},
    "compiled": {"compiled", "backends"},
    "modelzoo": {"modelzoo", "backends"},
    "backends": {"backends"},
}
COMPILER_INTERNALS = ("torch._inductor", "torch._functorch", "torch._dynamo", "torch._export", "torch._C._aoti")
BACKEND_CLASS = re.compile(r"^class \w+\((?:[\w.]+\.)?Backend\)", re.MULTILINE)


@dataclass(frozen=True)
class Import:
    """`module` is the full dotted name; for `from a import b` both a and a.b are listed."""

    module: str
    line: int
    at_top: bool


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports(file: Path) -> tuple[Import, ...]:
    """Every import of a file, those for type checking and inside functions included."""
    found: list[Import] = []

    def visit(node: ast.AST, at_top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(name.name, node.lineno, at_top) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = module_name(file).split(".")
                package = package if file.name == "__init__.py" else package[:-1]
                base = ".".join(package[: len(package) - node.level + 1])
                module = f"{base}.{module}".rstrip(".")
            found.append(Import(module, node.lineno, at_top))
            found.extend(Import(f"{module}.{name.name}", node.lineno, at_top) for name in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not inside)

    visit(tree_of(file), True)
    return tuple(found)


def is_of(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def offences(files: list[Path], *packages: str, only_at_top: bool = False) -> list[str]:
    """`file:line imports module` for each import of one of `packages`."""
    assert files, "no source was found to check"
    return [
        f"{relative(file)}:{one.line} imports {one.module}"
        for file in files
        for one in imports(file)
        if is_of(one.module, *packages) and (one.at_top or not only_at_top)
    ]


# ---- imports point down ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    forbidden = set(ROOMS) - MAY_IMPORT[room] | {"tests", "benchmarks"}
    assert not offences(sources(room), *sorted(forbidden))


def backend_files() -> list[Path]:
    return [file for file in sources("backends") if BACKEND_CLASS.search(file.read_text(encoding="utf-8"))]


def test_no_backend_imports_another():
    files = backend_files()
    for file in files:
        others = [module_name(other) for other in files if other != file]
        assert not (others and offences([file], *others))


def test_the_model_zoo_names_no_concrete_backend_no_config_library_and_no_distributed():
    concrete = [module_name(file) for file in backend_files()]
    assert concrete
    assert not offences(sources("modelzoo"), *concrete, "omegaconf", "torch.distributed")


def test_only_the_config_touches_omegaconf():
    config = ROOT / "apps/training/config_values.py"
    assert offences([config], "omegaconf")
    assert not offences([file for file in sources(*ROOMS) if file != config], "omegaconf")


def test_nothing_needs_triton_or_mlir_to_be_imported():
    assert not offences(sources(*ROOMS), "triton", "torch_mlir", "iree", only_at_top=True)


def test_only_the_room_of_mlir_touches_its_packages():
    """They are an extra: whatever else imported them would fail where it is not installed."""
    room = sources("compiled/mlir")
    assert offences(room, "torch_mlir")
    assert offences(room, "iree")
    assert not offences([file for file in sources(*ROOMS) if file not in room], "torch_mlir", "iree")


def attribute_chains(file: Path) -> list[tuple[str, int]]:
    """`torch._C._aoti.Loader` → that text, for each attribute access that starts at a plain name."""
    chains = []
    for node in ast.walk(tree_of(file)):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name):
            chains.append((".".join([inner.id, *reversed(parts)]), node.lineno))
    return chains


def test_only_lowering_touches_torchs_private_compiler():
    lowering = {ROOT / f"compiled/lowering{part}.py" for part in ("", "_cuda", "_pieces", "_products", "_speed")}
    files = [file for file in sources(*ROOMS) if file not in lowering]
    used = [
        f"{relative(file)}:{line} uses {chain}"
        for file in files
        for chain, line in attribute_chains(file)
        if is_of(chain, *COMPILER_INTERNALS)
    ]
    assert not offences(files, *COMPILER_INTERNALS) + used


# ---- starting is fast ------------------------------------------------------------------------------------------

TORCH_FREE = [
    "backends",
    "backends.errors",
    "backends.precision",
    "backends.rules_file",
    "modelzoo",
    *(module_name(file) for file in sorted((ROOT / "apps/training").glob("config*.py"))),
    *(module_name(file) for file in sources("apps/training/optimizers", "apps/training/schedules")),
    *(module_name(file) for file in sources("apps/training/loggers")),
]


def imported_by(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(run.stdout.split())


def test_what_help_needs_imports_neither_torch_nor_transformers():
    loaded = imported_by(f"import {', '.join(TORCH_FREE)}")
    assert not loaded & {"torch", "transformers", "datasets", "matplotlib", "triton", "tensorboard", "wandb", "mlflow"}


def test_listing_plugins_imports_none_of_them():
    code = (
        "import backends, sys; names = backends.available(); assert names\n"
        "assert not [name for name in names if f'backends.{name}' in sys.modules]"
    )
    assert "torch" not in imported_by(code)


# ---- files -----------------------------------------------------------------------------------------------------


def num_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def test_the_story_script_fits_one_sitting():
    assert num_lines(ROOT / "apps/train_llm.py") < 250


def test_no_file_is_longer_than_300_lines():
    lengths = {relative(file): num_lines(file) for file in sources(*ROOMS, "tests")}
    assert not {name: length for name, length in lengths.items() if length > 300}


def third_party_names() -> set[str]:
    """Names under which somebody else's package is imported: our dependencies, what is installed, the well known."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    declared = {re.split(r"[^\w-]", requirement)[0].replace("-", "_").lower() for requirement in wanted}
    installed = {name for name, owners in packages_distributions().items() if set(owners) != {project["name"]}}
    known = {"torch", "triton", "torch_mlir", "optuna", "ray", "wandb", "mlflow", "peft", "accelerate", "deepspeed"}
    return declared | installed | known


def test_no_file_or_folder_is_named_like_a_package():
    """A script started from its folder would import it instead."""
    names = third_party_names()
    paths = {file if file.stem != "__init__" else file.parent for file in sources(*ROOMS)}
    assert not [relative(path) for path in paths if path.stem.lower() in names]


def test_no_script_is_named_like_a_module_of_python():
    scripts = [file for folder in (".", "apps", "benchmarks") for file in (ROOT / folder).glob("*.py")]
    assert not [relative(file) for file in scripts if file.stem in sys.stdlib_module_names]


# ---- the rules can be broken -----------------------------------------------------------------------------------


def test_an_import_is_found_wherever_it_hides(tmp_path, monkeypatch):
    """Guards the guard: relative, aliased, inside a function, for type checking only."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "modelzoo" / "families" / "probe.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from ..other import thing\n"
        "from . import near\n"
        "import torch.distributed as dist\n"
        "if TYPE_CHECKING:\n    from compiled import program\n"
        "def late():\n    import triton\n    torch._C._aoti.Loader()\n"
    )
    found = {(one.module, one.at_top) for one in imports(file)}
    assert {("modelzoo.other", True), ("modelzoo.other.thing", True), ("modelzoo.families.near", True)} <= found
    assert {("torch.distributed", True), ("compiled.program", True), ("triton", False)} <= found
    assert offences([file], "compiled") == [
        "modelzoo/families/probe.py:5 imports compiled",
        "modelzoo/families/probe.py:5 imports compiled.program",
    ]
    assert ("torch._C._aoti.Loader", 8) in attribute_chains(file)
