"""What git still knows: whether a commit is in this clone, what the code was in it, which commit holds some results."""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from latentloom.tracking.provenance import CODE


@dataclass(frozen=True)
class History:
    """The history of the project in ``root``; outside git nothing is in it."""

    root: Path

    def has(self, commit: str) -> bool:
        """Whether the commit is in this clone."""
        return self._git("cat-file", "-e", f"{commit}^{{commit}}") is not None

    def head(self) -> str | None:
        """The commit that is checked out."""
        return self._line("rev-parse", "HEAD")

    def has_remotes(self) -> bool:
        """Whether there is another clone to fetch from."""
        return bool(self._line("remote"))

    def subject(self, commit: str) -> str | None:
        """The first line of a commit's message."""
        return self._line("log", "-1", "--format=%s", commit)

    def branches(self, commit: str) -> list[str]:
        """The branches and tags that hold a commit; git sweeps one away, in time, that none holds."""
        given = self._git("for-each-ref", "--contains", commit, "--format=%(refname:short)", *_BRANCHES)
        return (given or b"").decode().split()

    def read(self, commit: str, path: str) -> bytes | None:
        """A file as it was in a commit."""
        return self._git("show", f"{commit}:./{path}")

    def blob(self, name: str) -> bytes:
        """The content that git knows by that id."""
        return self._git("cat-file", "blob", name) or b""

    def unpack(self, commit: str, path: str, folder: Path) -> None:
        """Write what a commit holds under ``path`` into ``folder``; nothing where it holds nothing there."""
        archive = self._git("archive", commit, "--", path)
        if archive is not None:
            subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)

    def naming(self, text: str, *paths: str) -> list[str]:
        """The commits that brought ``text`` into one of ``paths``, branches before experiments, the oldest first."""
        found: list[str] = []
        for refs in (("--branches", "--tags", "--remotes"), ("--all",)):
            given = self._git("log", *refs, "--reverse", "--format=%H", "-S", text, "--", *paths)
            found += [commit for commit in (given or b"").decode().split() if commit not in found]
        return found

    def changing(self, path: str) -> list[str]:
        """The commits that changed what is under ``path``, the newest first."""
        return (self._git("log", "--all", "--format=%H", "--", path) or b"").decode().split()

    def code(self, commit: str, diff: bytes | None = None) -> dict[str, str] | None:
        """The files of code and params in a commit, changed by ``diff``: path -> git's id of the content.

        None where the commit is not here, or the diff does not fit it.
        """
        if not diff:
            listed, column = self._git("ls-tree", "-r", "-z", commit, "--", *CODE), 2
        else:
            listed, column = self._patched(commit, diff), 1
        if listed is None:
            return None
        entries = (entry.partition("\t") for entry in listed.decode("utf-8", "surrogateescape").split("\0") if entry)
        return {path: about.split()[column] for about, _, path in entries}

    def _patched(self, commit: str, diff: bytes) -> bytes | None:
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}  # the user's own stays as it is
            if self._git("read-tree", commit, **index) is None:
                return None
            if self._git("apply", "--cached", "--whitespace=nowarn", given=diff, **index) is None:
                return None
            return self._git("ls-files", "-s", "-z", "--", *CODE, **index)

    def _line(self, *arguments: str) -> str | None:
        given = self._git(*arguments)
        return given.decode("utf-8", "replace").strip() or None if given is not None else None

    def _git(self, *arguments: str, given: bytes | None = None, **environment: str) -> bytes | None:
        command = ["git", "-C", str(self.root), *arguments]
        try:
            result = subprocess.run(command, input=given, capture_output=True, check=True, env=os.environ | environment)
        except (OSError, subprocess.CalledProcessError):
            return None
        return result.stdout


_BRANCHES = ("refs/heads", "refs/remotes", "refs/tags")
