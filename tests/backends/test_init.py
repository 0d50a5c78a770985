import subprocess
import sys
from pathlib import Path

import pytest

import backends
from backends.dense import Dense
from backends.errors import UserError


def in_a_fresh_process(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_listing_backends_imports_none_of_them():
    loaded = in_a_fresh_process(
        "import sys, backends; names = backends.available(); assert 'dense' in names;"
        "print([m for m in sys.modules if m == 'torch' or m.startswith('backends.') and m != 'backends.errors'])"
    )
    assert loaded == "[]"


def test_only_files_that_define_a_backend_are_listed():
    house = {"base", "errors", "layers", "options", "precision", "routing", "routing_rules", "routing_table", "state"}
    files = {file.stem for file in Path(backends.__file__).parent.glob("*.py")}
    assert house < files
    assert "dense" in backends.available()
    assert not house & set(backends.available())


def test_a_new_file_is_a_new_backend(tmp_path):
    """Copy the package, drop one file in, and use it: nothing is registered anywhere."""
    package = tmp_path / "backends"
    package.mkdir()
    for file in Path(backends.__file__).parent.glob("*.py"):
        (package / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    (package / "half_price.py").write_text(
        "from backends.base import Backend\n"
        "class Helper(Backend): pass\n"
        "class HalfPrice(Backend):\n"
        "    def linear(self, x, weight, bias, state, *, training=False):\n"
        "        return x @ weight.T / 2, state\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import backends; print(backends.load('half_price'))"
    assert in_a_fresh_process(code) == "half_price"


def test_load_by_file_name():
    assert isinstance(backends.load("dense"), Dense)


def test_load_from_outside():
    backend = backends.load("tests.backends.stateful_backend:ScaledBackend", levels=16)
    assert backend.config.levels == 16
    assert backend.name == "tests.backends.stateful_backend:ScaledBackend"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optcal", "Unknown backend 'optcal'"),
        ("dens", "Did you mean 'dense'?"),
        ("errors", "Unknown backend 'errors'"),
        ("no_such_package.lab:Lab", "Cannot import module 'no_such_package.lab'"),
        (":Lab", "Expected package.module:Class"),
        ("json:Lab", "Module 'json' has no class 'Lab'."),
        ("tests.backends.stateful_backend:Scaled", "Did you mean 'ScaledBackend'?"),
        ("json:JSONDecoder", "'json:JSONDecoder' is no backend. Expected a subclass of backends.base.Backend"),
        ("json:loads", "'json:loads' is no backend."),
    ],
)
def test_a_wrong_name_is_one_clear_line(name, message):
    with pytest.raises(UserError) as error:
        backends.load(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_import_inside_an_outside_module_is_told_apart_from_a_missing_module(tmp_path, monkeypatch):
    (tmp_path / "lab_with_typo.py").write_text("import torhc\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'lab_with_typo' of backend 'lab_with_typo:Lab': No module named 'torhc'"):
        backends.load("lab_with_typo:Lab")


def test_options_are_checked_by_the_backend():
    with pytest.raises(UserError, match="Did you mean 'levels'"):
        backends.load("tests.backends.stateful_backend:ScaledBackend", level=16)
    with pytest.raises(UserError, match=r"levels is 1\. Expected at least 2\."):
        backends.load("tests.backends.stateful_backend:ScaledBackend", levels=1)


def test_an_unknown_attribute_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'rout'"):
        _ = backends.rout
