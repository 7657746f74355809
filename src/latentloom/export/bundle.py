"""Modules of this package as one file that needs nothing of the package: for code that travels with a model.

A module and what it imports of the package, at any depth, are put one after the other, the imported before the
importing, as they are: without their imports of each other, and with all others at the top. So there is one text of the
code; the file is made from it at each export.
"""

import ast
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import latentloom

PACKAGE = Path(latentloom.__file__).parent
TYPES_ONLY = "TYPE_CHECKING"
NO_HASH = 'CODE = ""'  # a line of a module which asks that the hash of all bundled modules be put there


def bundle(module: str) -> str:
    """``module``, a dotted name such as ``latentloom.diffusion.unet``, and all that it needs of the package: one text.

    Raises:
        ValueError: when modules that are bundled use one name for two things, or import of the package in another way
            than by ``from latentloom.MODULE import NAME`` at their top: both are for us to change.
    """
    files = list(_with_needed(_file(module), []))
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    _check_names(trees)
    code = sha256("".join(file.read_text(encoding="utf-8") for file in files).encode()).hexdigest()
    head = f"# Made by `latentloom export` from the modules that it names. Their hash is {code[:12]}.\n"
    parts = ["\n".join([head, *_joined_imports(trees.values())]), *(_part(file, trees[file]) for file in files)]
    return "\n\n\n".join(parts).replace(NO_HASH, f'CODE = "{code[:12]}"') + "\n"


def _with_needed(file: Path, seen: list[Path]) -> Iterator[Path]:
    """A module after those that it imports."""
    if file in seen:
        return
    seen.append(file)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    at_the_top = _imports(tree)
    for node in ast.walk(tree):
        own = isinstance(node, ast.Import | ast.ImportFrom) and _is_own(node)
        if own and node not in at_the_top and not any(node in skipped.body for skipped in _types_only(tree)):
            raise ValueError(f"{file}, line {node.lineno}: a module that is bundled imports at its top")
    for node in at_the_top:
        if _is_own(node):
            yield from _with_needed(_file(node.module), seen)
    yield file


def _imports(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


def _joined_imports(trees: Iterable[ast.Module]) -> list[str]:
    """The lines that import what all modules do from elsewhere, a line for each library's module."""
    plain: set[str] = set()
    names: dict[str, set[str]] = {}
    for node in (node for tree in trees for node in _imports(tree) if not _is_own(node)):
        found = [ast.unparse(alias) for alias in node.names if alias.name != TYPES_ONLY]
        if isinstance(node, ast.Import):
            plain |= {f"import {name}" for name in found}
        else:
            names.setdefault(node.module, set()).update(found)
    future = [f"from __future__ import {', '.join(sorted(names.pop('__future__', ())))}", ""]
    lines = [f"from {module} import {', '.join(sorted(own))}" for module, own in sorted(names.items()) if own]
    return [*future, *sorted(plain), *lines]


def _is_own(node: ast.Import | ast.ImportFrom) -> bool:
    named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    own = any(name.partition(".")[0] == PACKAGE.name for name in named)
    if own and (isinstance(node, ast.Import) or any(alias.asname for alias in node.names)):
        raise ValueError(f"`{ast.unparse(node)}`: a module that is bundled imports names of modules, as they are")
    return own


def _file(module: str) -> Path:
    file = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        raise ValueError(f"{module} is no module of one file: a module that is bundled imports names from such alone")
    return file


def _types_only(tree: ast.Module) -> list[ast.If]:
    return [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == TYPES_ONLY]


def _check_names(trees: dict[Path, ast.Module]) -> None:
    """That each name at the top of a module means one thing in all of them."""
    meanings: dict[str, str] = {}
    for file, tree in trees.items():
        for name, meaning in _names(file, tree):
            if meanings.setdefault(name, meaning) != meaning:
                raise ValueError(f"{name} is {meanings[name]} and {meaning}: they cannot go into one file")


def _names(file: Path, tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            if not _is_own(node):
                source = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                yield from ((alias.asname or alias.name.partition(".")[0], source + alias.name) for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, f"that of {file.name}"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                stored = [
                    own for own in ast.walk(target) if isinstance(own, ast.Name) and isinstance(own.ctx, ast.Store)
                ]
                yield from ((own.id, f"that of {file.name}") for own in stored)


def _part(file: Path, tree: ast.Module) -> str:
    """A module's own lines, below its docstring as a comment."""
    lines = file.read_text(encoding="utf-8").splitlines()
    left_out = [*_imports(tree), *_types_only(tree)]
    docstring = ast.get_docstring(tree) or ""
    if docstring:
        left_out.append(tree.body[0])
    for node in left_out:
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    own = "\n".join(line for line in lines if line is not None).strip("\n")
    while "\n\n\n\n" in own:
        own = own.replace("\n\n\n\n", "\n\n\n")
    name = file.relative_to(PACKAGE.parent).as_posix()
    comment = [f"# {line}".rstrip() for line in (f"---- {name} ----", *docstring.splitlines())]
    return "\n".join(comment) + "\n\n" + own
