"""A cluster of Ray: two machines with a core each, as far as Ray can tell, and each a process of its own."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


def add_node(cluster: Any, **options: Any) -> None:
    """Add a node; once more where a loaded machine took longer for it than the thirty seconds that Ray waits."""
    try:
        cluster.add_node(**NODE, **options)
    except Exception as error:  # Ray raises nothing narrower
        if "timed out during startup" not in str(error):
            raise
        cluster.add_node(**NODE, **options)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """``ray.cluster_utils.Cluster``, joined by this process; the driver's node, and another that tests may remove."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from latentloom import engine_ray

    patched = pytest.MonkeyPatch()
    folder = tempfile.mkdtemp(prefix="r-")  # its own, and short: sockets in it have names of at most 107 bytes
    patched.setenv("RAY_TMPDIR", folder)  # where it says, too, which cluster is this machine's
    patched.setenv("RAY_AUTH_MODE", "disabled")  # else a token is written into the user's home
    made = Cluster()
    try:
        add_node(made)
        add_node(made)
        patched.setenv("RAY_ADDRESS", made.address)
        engine_ray.connect()
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        patched.undo()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def second_node(cluster: Any) -> Iterator[Any]:
    """The node that is not the driver's, to be removed: afterwards there is one again."""
    yield next(iter(cluster.worker_nodes))
    if not cluster.worker_nodes:
        add_node(cluster)


@pytest.fixture
def on_ray(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages run on the cluster."""
    monkeypatch.setenv("LATENTLOOM_ENGINE", "ray")


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """A folder where functions leave what they did, whatever process they ran in."""
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"
