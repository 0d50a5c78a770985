"""A C++ compiler that does the same work once in a test session, for all its processes: `CXX` of every test.

Most of a compile here is g++ on the code around a region's kernels, the wrapper. Tiny models of many tests share
regions: the key is everything that g++ reads (arguments, source, objects), so a file from here is the one it would
write again. And all wrappers use the same templates of the runtime, two thirds of what g++ does for one: the first one
is compiled with them, and the libraries of all take them from there.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

WITHOUT_TEMPLATES = ["-fno-implicit-templates", "-fno-implicit-inline-templates"]


def main(compiler: str, folder: Path, arguments: list[str]) -> int:
    """Run `compiler` with `arguments`, or copy from `folder` what an equal run wrote."""
    inputs = [Path(a) for a in arguments if a.endswith((".cpp", ".hpp", ".o")) and os.path.isfile(a)]
    if "-o" not in arguments or not inputs:  # a question, or a header to precompile
        return run(compiler, arguments)
    output = Path(arguments[arguments.index("-o") + 1])
    kept = folder / key(compiler, arguments, inputs)
    if is_wrapper(compiler, inputs, arguments):
        command_of(output).write_text(json.dumps(arguments))
    with locked(kept):  # who comes second waits: cheaper than to compile side by side
        if not kept.exists():
            ended = make(compiler, folder, arguments, inputs)
            if ended or not output.is_file():
                return ended
            Path(f"{kept}.part").write_bytes(zlib.compress(output.read_bytes(), 1))  # a fifth
            os.rename(f"{kept}.part", kept)
            return 0
    output.write_bytes(zlib.decompress(kept.read_bytes()))
    if output.suffix == ".so":
        output.chmod(0o755)
    return 0


def make(compiler: str, folder: Path, arguments: list[str], inputs: Sequence[Path]) -> int:
    """Compile or link: a wrapper without templates, then its library with those that wrappers before it have left."""
    if is_wrapper(compiler, inputs, arguments):
        return run(compiler, [*arguments, *WITHOUT_TEMPLATES])
    command = next((json.loads(command_of(p).read_text()) for p in inputs if command_of(p).exists()), None)
    if "-shared" not in arguments or command is None:
        return run(compiler, arguments)
    templates = folder / f"templates-{flags_key(compiler, command)}.a"
    behind = arguments.index(str(inputs[-1])) + 1
    # The archive's objects are other regions' too: what is not used of them is left out, and a missing name an error.
    complete = [*arguments[:behind], str(templates), "-Wl,--gc-sections", "-Wl,-z,defs", *arguments[behind:]]
    if templates.exists() and run(compiler, complete, quiet=True) == 0:
        return 0
    add_templates(compiler, command, templates)  # it uses one that no wrapper before it has
    if run(compiler, complete, quiet=True) == 0:
        return 0
    return run(compiler, command) or run(compiler, arguments)  # as if there were no archive


def add_templates(compiler: str, command: list[str], templates: Path) -> None:
    """Compile a wrapper in whole, and add what it gives to the archive."""
    with locked(templates):
        part = Path(f"{templates}.part")
        if templates.exists():
            shutil.copy(templates, part)
        place = command.index("-o") + 1
        made = f"{templates}-{len(list(templates.parent.glob(f'{templates.name}-*')))}.o"
        run(compiler, [*command[:place], made, *command[place + 1 :], "-ffunction-sections", "-fdata-sections"])
        subprocess.run(["objcopy", "--weaken", made], check=True)  # each region has these functions of its own
        subprocess.run(["ar", "qc", part, made], check=True)
        os.rename(part, templates)


def is_wrapper(compiler: str, inputs: Sequence[Path], arguments: list[str]) -> bool:
    """Optimised ones are left alone, since which templates have code of their own is then another matter in each; and
    so is what other compilers than GCC compile, which know no such flags."""
    return inputs[0].name.endswith(".wrapper.cpp") and "-O0" in arguments and "g++" in Path(compiler).name


def command_of(wrapper: Path) -> Path:
    """Where the arguments lie that made an object: beside it."""
    return wrapper.with_suffix(".command")


def run(compiler: str, arguments: Sequence[str], *, quiet: bool = False) -> int:
    stderr = subprocess.DEVNULL if quiet else None
    return subprocess.run([compiler, *arguments], check=False, stderr=stderr).returncode


def flags_key(compiler: str, arguments: Sequence[str]) -> str:
    """Names what files are compiled with."""
    flags = [a for a in arguments if not a.endswith((".cpp", ".hpp", ".o", ".so"))]
    return hashlib.sha256(repr((compiler, flags)).encode()).hexdigest()[:32]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def key(compiler: str, arguments: list[str], inputs: Sequence[Path]) -> str:
    """Names the run by what it depends on, which is neither its files' names, nor comments, which hold such names, nor
    the address of a Python function in the text of a message."""
    digest = hashlib.sha256(flags_key(compiler, arguments).encode())
    for path in inputs:
        content = path.read_bytes()
        if path.suffix == ".cpp":
            content = re.sub(rb"(?m)^//.*$|(?<= at )0x[0-9a-f]+(?=>)", b"", content)
        digest.update(content + b"\0")
    return digest.hexdigest()[:32]


if __name__ == "__main__":
    sys.exit(main(os.environ["TESTS_CXX"], Path(os.environ["TESTS_CXX_FOLDER"]), sys.argv[1:]))
