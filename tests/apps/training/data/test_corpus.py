"""The embedded corpus: real text, everywhere, in one order, without tests."""

from apps.training.data import corpus


def test_the_corpus_is_some_megabytes_of_python_sources():
    files = corpus.files()
    assert sum(path.stat().st_size for path in files) > 8_000_000
    assert {path.suffix for path in files} == {".py"}
    assert {"pathlib.py", "textwrap.py", "argparse.py"} <= {path.name for path in files}


def test_tests_tables_and_installed_packages_are_left_out():
    names = [f"/{path.relative_to(corpus.folder()).as_posix()}" for path in corpus.files()]
    unwanted = ("/test/", "/tests/", "/site-packages/", "/encodings/", "/_sysconfigdata", "/config-")
    assert not [name for name in names if any(part in name for part in unwanted)]


def test_the_order_is_by_name_and_every_file_is_text():
    files = corpus.files()
    assert files == sorted(files, key=lambda path: path.as_posix())
    for path in files:
        path.read_text(encoding="utf-8")
