"""The artifact: one file that holds a compiled train step. No weights, ever.

A zip without compression: `manifest.json`, `regions/*` (machine code), `graphs/*.txt` (readable). The manifest lists
the sha256 of every member, and the zip's comment that of the manifest, so that a truncated or altered file is refused
before any of its code runs.
"""

import contextlib
import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.errors import UserError
from compiled.regions import Region, RegionSpec
from compiled.spec import SCHEMA_VERSION, FieldDifference, StepSpec, difference, difference_table

SUFFIX = ".substrate"
_MANIFEST_PARTS = {
    "spec",
    "routing",
    "regions",
    "schedule",
    "optimizer",
    "parameters",
    "trained_parameters",
    "cost",
    "trace_seconds",
    "compile_seconds",
    "members",
}
_COMPILE_AGAIN = "compile it again with command=compile."


@dataclass(frozen=True)
class Artifact:
    """An opened, verified artifact: its path and manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        return self.manifest["spec"]

    @property
    def device_type(self) -> str:
        return self.spec["device"]["kind"]

    def region_specs(self) -> dict[str, RegionSpec]:
        return {name: RegionSpec.from_json(entry) for name, entry in self.manifest["regions"].items()}

    def require(self, spec: StepSpec, recompile: str) -> None:
        """Refuse a run the artifact was not made for: `UserError` with the differing fields and the command to type."""
        found = difference(self.spec, spec.to_json())
        if found:
            raise UserError(
                f"Artifact {self.path} was compiled for another step: {len(found)} field(s) differ. "
                f"Compile one for this run: {recompile}\n" + difference_table(found)
            )

    def load_regions(self) -> dict[str, Region]:
        """Machine code of every region, ready to run; nothing is compiled."""
        from compiled import lowering

        regions = {}
        with _loading(self.path):
            if self.spec.get("target"):
                from compiled.mlir.loading import load_regions

                return load_regions(self.path, self.spec["target"], self.region_specs(), self._read)
            host = {name: digest for name, digest in self.manifest["members"].items() if name.startswith("host/")}
            modules = {name: self._read(name, digest) for name, digest in host.items()}
            lowering.install_host_modules({name.removeprefix("host/"): modules[name] for name in modules})
            with tempfile.TemporaryDirectory(prefix="substrate-load-") as folder:
                for name, spec in self.region_specs().items():
                    file = Path(folder) / Path(spec.file).name
                    file.write_bytes(self._read(spec.file, spec.sha256))
                    # the code stays mapped after its file is gone, so that nothing is left behind, not even by a kill
                    regions[name] = Region(spec, lowering.load(file, self.device_type))
        return regions

    def _read(self, name: str, digest: str) -> bytes:
        """A member as it was when the artifact was opened; `UserError` when the file was replaced since."""
        with _reading(self.path) as archive:
            return _verified(archive, name, digest, self.path)


def pack(manifest: dict[str, Any], members: Iterable[tuple[str, bytes]]) -> bytes:
    """The artifact as bytes: equal input, equal bytes. Adds every member's sha256 to the manifest's `members`."""
    buffer = io.BytesIO()
    digests = {}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members:
            digests[name] = hashlib.sha256(content).hexdigest()
            archive.writestr(zipfile.ZipInfo(name), content)
        text = json.dumps(manifest | {"members": digests}, indent=1).encode()
        archive.writestr(zipfile.ZipInfo("manifest.json"), text)
        archive.comment = hashlib.sha256(text).hexdigest().encode()
    return buffer.getvalue()


def open_artifact(path: Path) -> Artifact:
    """Open and verify the file; `UserError` when it is missing, truncated, altered or no artifact."""
    if not path.is_file():
        raise UserError(
            f"No artifact at '{path}'. Give an existing {SUFFIX} file, or compile one with command=compile."
        )
    with _reading(path) as archive:
        manifest = _manifest(archive, path)
        for name, digest in manifest["members"].items():
            _verified(archive, name, digest, path)
    return Artifact(path, manifest)


def read_member(artifact: Artifact, name: str) -> bytes:
    """One member's content, for people who inspect an artifact."""
    with zipfile.ZipFile(artifact.path) as archive:
        return archive.read(name)


@dataclass(frozen=True)
class Nearest:
    """The artifact of a folder that differs least from a spec."""

    artifact: Artifact
    differences: list[FieldDifference]


def find(folder: Path, spec: StepSpec) -> Artifact | Nearest | None:
    """The artifact in `folder` that serves `spec`; else the nearest one with its differences; None when there is none
    at all.

    Files that cannot be read are passed over: one broken file must not hide a good one.
    """
    exact = folder / spec.file_name
    candidates = [exact] if exact.is_file() else []
    if folder.is_dir():
        candidates += sorted(path for path in folder.glob(f"*{SUFFIX}") if path != exact)
    nearest: Nearest | None = None
    for path in candidates:
        try:
            manifest = peek(path)
        except UserError:
            if path == exact:
                raise
            continue
        found = difference(manifest["spec"], spec.to_json())
        if not found:
            return open_artifact(path)
        if nearest is None or len(found) < len(nearest.differences):
            nearest = Nearest(Artifact(path, manifest), found)
    return nearest


def peek(path: Path) -> dict[str, Any]:
    """The manifest alone, without verifying the machine code: enough to compare specs."""
    with _reading(path) as archive:
        return _manifest(archive, path)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip at `path`; whatever reading it raises is a `UserError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:  # zipfile answers damage with a dozen kinds: of zlib, struct, codecs, seeks, versions
        raise UserError(
            f"'{path}' is not a complete artifact ({type(error).__name__}: {error}); {_COMPILE_AGAIN}"
        ) from None


@contextlib.contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Machine code is loaded from files in the temporary folder, which may be full, or mounted without execution."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Cannot load the machine code of artifact {path}: {str(error).splitlines()[0]}. "
            "Set TMPDIR to a folder that has room and is not mounted noexec."
        ) from error


def _manifest(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    """The manifest as `pack` wrote it: its sha256 is the zip's comment, and its schema the one read here."""
    text = archive.read("manifest.json")
    if hashlib.sha256(text).hexdigest().encode() != archive.comment:
        raise UserError(f"Artifact {path} is altered: its manifest's sha256 is not the recorded one; {_COMPILE_AGAIN}")
    manifest: dict[str, Any] = json.loads(text)
    versions = manifest.get("spec", {}).get("versions", {})  # the only fields any schema is trusted to have
    if str(versions.get("schema")) != str(SCHEMA_VERSION):
        raise UserError(
            f"Artifact {path} has schema version {versions.get('schema')}, this program reads {SCHEMA_VERSION}; "
            f"{_COMPILE_AGAIN}"
        )
    missing = sorted(_MANIFEST_PARTS - manifest.keys())
    if missing:
        raise UserError(f"Artifact {path} lacks {', '.join(missing)} in its manifest; {_COMPILE_AGAIN}")
    return manifest


def _verified(archive: zipfile.ZipFile, name: str, digest: str, path: Path) -> bytes:
    content = archive.read(name)
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"Artifact {path} is altered: the sha256 of {name} is not the recorded one; {_COMPILE_AGAIN}")
    return content
