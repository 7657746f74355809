"""Which code made this: the modules that a script reaches by its imports, and one hash of them.

`dvc.yaml` lists exactly these modules as a stage's dependencies (a test compares), a checkpoint records their hash, and
a picture names the hash of those that generated it.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = "latentloom"
# Modules and packages that decide nothing of what a stage computes: params.yaml itself is what DVC compares, paths and
# errors are no content, previews only show, and tracking, lineage and registry only record.
UNDECIDING = (
    *("params", "params_file", "layout", "errors", "stage", "files", "source_code"),
    *("training.preview", "tracking", "lineage", "registry"),
)


def deciding_modules(script: Path, package: Path) -> list[Path]:
    """The files that decide what ``script`` computes: itself, and what of ``package`` it imports, at any depth.

    Imports inside functions count. The package's own code imports a name from the module that defines it, never from
    the package around it.
    """
    reached, waiting = {script}, [script]
    while waiting:
        for module in _imports(waiting.pop(), package):
            if module not in reached and not _is_undeciding(module, package):
                reached.add(module)
                waiting.append(module)
    return sorted(reached)


def code_hash(files: Iterable[Path], root: Path) -> str:
    """One hash of files, by their paths below ``root`` and their bytes: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _is_undeciding(module: Path, package: Path) -> bool:
    name = ".".join(module.relative_to(package).with_suffix("").parts)
    return any(name == own or name.startswith(f"{own}.") for own in UNDECIDING)


@cache
def _imports(file: Path, package: Path) -> frozenset[Path]:
    """The modules of the package that one file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(module for name in names for module in _modules(name, package))


def _modules(name: str, package: Path) -> Iterator[Path]:
    """The files behind a dotted name: of each of its parts, the module or the package of that name.

    An empty ``__init__`` decides nothing, and DVC warns of empty files.
    """
    first, *parts = name.split(".")
    place = package
    for part in parts if first == PACKAGE else ():
        place /= part
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file() and file.stat().st_size:
                yield file
