"""Whether the packages of the extra [mlir] are here."""

import importlib.util

from backends.errors import UserError

EXTRA = "mlir"


def require_extra(*packages: str, what: str = "compile.target=mlir") -> None:
    """`UserError` that says which extra to install when one of `packages` (torch_mlir, iree.compiler, …) is missing."""
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        raise UserError(
            f"{what} needs {', '.join(missing)}, which is not installed. "
            f"Install the extra: pip install 'substrate[{EXTRA}]'."
        )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package above it
        return False
