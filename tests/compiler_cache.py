"""A C++ compiler that does the same work once in a test session, for all its processes: `CXX` of every test.

Most of a compile here is g++ on the code around a region's kernels, and the tiny models of many tests share regions.
The key is everything that g++ reads (arguments, source, objects), so a file from here is the one it would write again.
"""

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path


def main(compiler: str, folder: Path, arguments: list[str]) -> int:
    """Run `compiler` with `arguments`, or copy from `folder` what an equal run wrote."""
    inputs = [Path(a) for a in arguments if a.endswith((".cpp", ".o")) and os.path.isfile(a)]
    if "-o" not in arguments or "-E" in arguments or not inputs:  # a question, or a header
        return subprocess.run([compiler, *arguments], check=False).returncode
    output = Path(arguments[arguments.index("-o") + 1])
    kept = folder / key(compiler, arguments, inputs, output)
    with open(f"{kept}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits: cheaper than to compile side by side
        if not kept.exists():
            ended = subprocess.run([compiler, *arguments], check=False).returncode
            if ended or not output.is_file():
                return ended
            Path(f"{kept}.part").write_bytes(zlib.compress(output.read_bytes(), 1))  # a fifth of 4 MB
            os.rename(f"{kept}.part", kept)
            return 0
    output.write_bytes(zlib.decompress(kept.read_bytes()))
    if output.suffix == ".so":
        output.chmod(0o755)
    return 0


def key(compiler: str, arguments: list[str], inputs: list[Path], output: Path) -> str:
    """Names the run by what it depends on; the names of its files, and comments, which hold such names, are no part."""
    written = [a for a in arguments if a not in (*map(str, inputs), str(output))]
    digest = hashlib.sha256(repr((compiler, written)).encode())
    for path in inputs:
        content = path.read_bytes()
        digest.update(re.sub(rb"(?m)^//.*$", b"", content) if path.suffix == ".cpp" else content)
        digest.update(b"\0")
    return digest.hexdigest()[:32]


if __name__ == "__main__":
    sys.exit(main(os.environ["TESTS_CXX"], Path(os.environ["TESTS_CXX_FOLDER"]), sys.argv[1:]))
