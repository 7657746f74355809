from pathlib import Path

import pytest
from tracked_runs import empty_store, project_root  # noqa: F401 (fixtures)


@pytest.fixture
def root(project_root) -> Path:  # noqa: F811
    return project_root
