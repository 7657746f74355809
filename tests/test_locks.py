"""requirements.lock is what `make repro` runs and no more; requirements-test.lock is what tests need on top."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def locked(name: str) -> dict[str, str]:
    """Package -> version."""
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in pins}


def needed_by(requirements: list[str]) -> set[str]:
    """The packages that installed packages ask for, at any depth, on this Python."""
    seen, waiting = set(), [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            further = distribution(wanted.name).requires or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, further):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*wanted.extras, "")):
                waiting.append(requirement)
    return {name for name, _ in seen}


PIPELINE, TESTS = locked("requirements.lock"), locked("requirements-test.lock")


def test_make_repro_installs_what_the_pipeline_needs_and_no_more():
    assert set(PIPELINE) == needed_by(PROJECT["dependencies"] + EXTRAS["pipeline"])


def test_make_test_installs_the_rest_and_no_package_twice():
    everything = needed_by(PROJECT["dependencies"] + [package for extra in EXTRAS.values() for package in extra])
    assert set(PIPELINE) | set(TESTS) == everything
    assert not set(PIPELINE) & set(TESTS)


def test_what_runs_here_is_what_is_locked():
    everything = PIPELINE | TESTS
    assert {package: public(distribution(package).version) for package in everything} == {
        package: public(version) for package, version in everything.items()
    }


def public(version: str) -> str:
    """Without the name of a build, and written as installers compare it: 2.002 is 2.2."""
    return Version(version).public


def test_no_package_of_image_transformations_is_pulled_in():
    assert "torchvision" not in PIPELINE | TESTS
