"""What git says of a project: its commit, what differs from it, and files of the commit; outside git, None."""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CODE = ("src", "pipelines", "params.yaml", "dvc.yaml", "requirements.lock", "pyproject.toml")


@dataclass(frozen=True)
class Git:
    """The repository of the project in ``root``."""

    root: Path

    def commit(self) -> str | None:
        """The commit that is checked out."""
        return self._line("rev-parse", "HEAD")

    def branch(self) -> str | None:
        """The branch that is checked out; ``HEAD`` where it is none."""
        return self._line("rev-parse", "--abbrev-ref", "HEAD")

    def code_diff(self) -> str:
        """How code and params differ from the commit, new files included, for ``git apply``; often empty."""
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}  # the user's own stays as it is
            paths = [path for path in CODE if (self.root / path).exists()]
            for command in (("read-tree", "HEAD"), ("add", "-A", "--", *paths)):
                if self._run(*command, **index) is None:
                    return ""
            diff = self._run("diff", "--cached", "--binary", "HEAD", "--", *paths, **index) or b""
        return diff.decode("utf-8", "surrogateescape")  # each byte is kept, ends of lines too

    def has(self, commit: str) -> bool:
        """Whether the commit is in this clone."""
        return self._run("cat-file", "-e", f"{commit}^{{commit}}") is not None

    def read(self, path: Path) -> bytes | None:
        """A file of the commit that is checked out, by its path below the root."""
        return self._run("show", f"HEAD:./{path}")

    def _line(self, *arguments: str) -> str | None:
        output = self._run(*arguments)
        return output.decode("utf-8", "replace").strip() or None if output is not None else None

    def _run(self, *arguments: str, **environment: str) -> bytes | None:
        command = ["git", "-C", str(self.root), *arguments]
        try:
            return subprocess.run(command, capture_output=True, check=True, env=os.environ | environment).stdout
        except (OSError, subprocess.CalledProcessError):
            return None
