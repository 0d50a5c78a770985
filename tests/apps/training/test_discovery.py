"""A plugin is a file: found by its name, holding exactly one class."""

import sys
from pathlib import Path

import pytest

from apps.training._discovery import find, load_subclass
from backends.errors import UserError


class Base:
    pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of plugins beside this project."""
    package = tmp_path / "some_plugins"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_base.py").touch()
    (package / "one.py").write_text("from tests_base import Base\nclass One(Base): pass\n")
    (package / "none.py").write_text("from tests_base import Base\n")
    monkeypatch.setitem(sys.modules, "tests_base", sys.modules[__name__])
    monkeypatch.syspath_prepend(tmp_path)
    return str(package)


def test_public_files_are_plugins_and_listing_imports_none(folder: str) -> None:
    assert find(folder) == ("none", "one")
    assert "some_plugins.one" not in sys.modules


def test_the_one_subclass_a_file_defines_is_its_plugin(folder: str) -> None:
    assert load_subclass("some_plugins", folder, "one", Base, kind="plugin").__name__ == "One"
    with pytest.raises(TypeError, match="exactly one subclass of Base, got 0"):
        load_subclass("some_plugins", folder, "none", Base, kind="plugin")
    with pytest.raises(UserError, match=r"Unknown plugin 'onee'\. Did you mean 'one'\?"):
        load_subclass("some_plugins", folder, "onee", Base, kind="plugin")
