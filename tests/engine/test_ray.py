"""Ray: the results of the local engine, in the same order; and what becomes of workers, machines and items that fail.

The functions are closures, which Ray sends by value, as workers cannot import the tests.
"""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentloom import engine_ray, sharding
from latentloom.encoding import cache
from latentloom.encoding.captions import encode_captions
from latentloom.encoding.latents import encode_images
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.shard_files import load_shard
from latentloom.encoding.text_encoder import TextEncoder
from latentloom.encoding.vae import Vae
from latentloom.engine import ordered_map
from latentloom.errors import UserError
from latentloom.ingestion.ingest import ingest
from latentloom.params import IngestParams
from latentloom.params_file import load_params

ROOT = Path(__file__).parents[2]
NODE = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
SHARD_BYTES = (2**10, 2**10, 2**12)  # so that few rows have several shards
TASK_ROWS = 8

# A driver of Ray that ends with its first shard: all tasks but the first wait for it to be killed.
DRIVER = f"""
import sys, time
from pathlib import Path
from latentloom import sharding
from latentloom.encoding import cache, latents
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.vae import Vae

sharding.TENSORS = sharding.ShardBytes{SHARD_BYTES}
cache.TASK_MISSING = {TASK_ROWS}
make_shards = latents.make_shards

def make_the_first(images, mirrored, vae, task):
    while task.shards[0].path.name != "00000.safetensors":
        time.sleep(0.1)
    return make_shards(images, mirrored, vae, task)

latents.make_shards = make_the_first
images, out, store = map(Path, sys.argv[1:])
latents.encode_images(Vae("bundled"), images, out, RowStore(store, 2**30))
"""

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("on_ray")]


def test_results_come_in_order_from_both_machines_and_the_first_that_fails_there_too(marks):
    def square(number):
        import time

        import ray

        node = ray.get_runtime_context().get_node_id()
        (marks / node).touch()
        while number == 0 and len(list(marks.iterdir())) < 2:
            time.sleep(0.01)  # the first is done after many others
        if number == 250:
            raise UserError("row 250 of the shard 7: damaged")
        return number**2, node

    results, given = ordered_map(square, iter(range(300))), []
    with pytest.raises(UserError, match=r"^row 250 of the shard 7: damaged$"):
        given.extend(results)
    assert [own for own, _ in given] == [number**2 for number in range(250)]
    assert len({node for _, node in given}) == 2


def test_the_items_of_a_worker_that_dies_are_computed_by_others_with_half_of_its_batch(marks, capfd):
    class Encoder:
        batch = 32

        def halve_batches(self, times):
            self.batch = 32 >> times

    def double(encoder, number):
        import os

        if number == 3 and encoder.batch > 8:
            (marks / f"{encoder.batch}").touch()
            os.kill(os.getpid(), 9)
        return 2 * number

    assert list(ordered_map(double, range(8), setup=Encoder)) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert {mark.name for mark in marks.iterdir()} == {"32", "16"}
    assert "a worker on" in capfd.readouterr().err


def test_an_item_that_kills_its_workers_ends_the_run_by_name(monkeypatch):
    monkeypatch.setattr(engine_ray, "TRIES", 2)

    def killed(name):
        import os

        if name == "shard 00002, row 7":
            os.kill(os.getpid(), 9)
        return name

    with pytest.raises(UserError, match="shard 00002, row 7: each of 2 workers of Ray that computed it died"):
        list(ordered_map(killed, ["shard 00001", "shard 00002, row 7", "shard 00003"]))


def test_a_run_survives_a_machine_that_goes(cluster, second_node):
    def where(number):
        import time

        import ray

        time.sleep(0.01)
        return number, ray.get_runtime_context().get_node_id()

    results = ordered_map(where, range(10**6))
    given = [next(results)]
    while len({node for _, node in given}) < 2:
        given.append(next(results))
    cluster.remove_node(second_node, allow_graceful=False)
    given += [next(results) for _ in range(500)]
    results.close()
    assert [number for number, _ in given] == list(range(len(given)))
    assert len({node for _, node in given[-100:]}) == 1


def test_an_item_that_lacked_memory_is_computed_again_and_one_that_never_has_enough_is_named(marks):
    def hungry(number):
        tried = len(list(marks.glob(f"{number}-*")))
        if (number == 5 and tried == 0) or number == 40:
            (marks / f"{number}-{tried}").touch()
            raise MemoryError(f"{number} is much")
        return number

    results, given = ordered_map(hungry, range(50)), []
    with pytest.raises(MemoryError, match="40 is much") as caught:
        given.extend(results)
    assert given == list(range(40))
    assert len(list(marks.glob("40-*"))) == engine_ray.TRIES
    assert "40 did not fit into memory 3 times" in caught.value.__notes__


def test_where_memory_does_not_suffice_half_of_the_machines_workers_end(cluster, marks, capfd):
    node = cluster.add_node(**NODE)
    large = node.node_id

    def hungry(number):
        import os
        import time

        import ray

        failed, own = marks / "failed", ray.get_runtime_context().get_node_id()
        if own == large and not failed.exists():
            failed.touch()
            raise MemoryError
        while not failed.exists():
            time.sleep(0.01)
        time.sleep(0.002)
        return number, own, os.getpid()

    try:
        results = list(ordered_map(hungry, range(600)))
    finally:
        cluster.remove_node(node, allow_graceful=False)
    assert [number for number, _, _ in results] == list(range(600))
    assert len({worker for _, own, worker in results[-300:] if own == large}) <= 1
    assert "the workers there go from 2 to 1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("resources", "with_state", "on_gpu", "expected"),
    [
        ({"CPU": 64.0, "GPU": 8.0}, True, True, (8, (8, 1))),
        ({"CPU": 256.0, "GPU": 8.0}, True, True, (8, (8, 1))),
        ({"CPU": 4.0, "GPU": 8.0}, True, True, (8, (0, 1))),
        ({"CPU": 64.0}, True, True, (0, (8, 1))),
        ({"CPU": 64.0, "GPU": 8.0, "memory": 32.0 * 2**30}, True, False, (16, (4, 0))),
        ({"CPU": 64.0, "memory": 256.0 * 2**30}, True, False, (64, (1, 0))),
        ({"CPU": 7.0, "memory": 9.0 * 2**30}, True, False, (4, (1, 0))),
        ({"CPU": 2.0, "memory": 2.0**30}, True, False, (1, (2, 0))),
        ({"CPU": 7.0, "GPU": 1.0}, False, False, (7, (1, 0))),
        ({}, True, False, (0, (1, 0))),
    ],
)
def test_a_machine_has_a_worker_for_each_gpu_or_for_some_cores(resources, with_state, on_gpu, expected):
    assert engine_ray.share(resources, with_state, on_gpu) == expected


def test_files_travel_to_machines_that_do_not_see_the_disk(monkeypatch, tmp_path, capfd):
    @dataclass(frozen=True)
    class Shard:
        reads: tuple[Path, ...]
        writes: tuple[Path, ...]

    @contextmanager
    def unseen(folder):
        yield folder / "not there"

    monkeypatch.setattr(engine_ray, "_probe", unseen)
    shards = []
    for number in range(20):
        source = tmp_path / f"{number // 2}.in"
        source.write_bytes(b"%d" % (number // 2))
        shards.append(Shard((source,), (tmp_path / "out" / f"{number}",)))

    def copy(state, shard):
        from latentloom.engine import here

        (source,), (target,) = shard.reads, shard.writes
        if here(source) == source or here(target) == target:
            raise AssertionError("the disk of the driver was used")
        here(target).write_bytes(state + here(source).read_bytes())
        return target.name

    for name, shard in zip(ordered_map(copy, shards, setup=lambda: b"of "), shards, strict=True):
        assert name == shard.writes[0].name
        assert shard.writes[0].read_bytes() == b"of " + shard.reads[0].read_bytes()
    assert "files travel through Ray" in capfd.readouterr().err


@pytest.fixture
def small_shards(monkeypatch):
    """Shards and tasks of few rows."""
    monkeypatch.setattr(sharding, "TENSORS", sharding.ShardBytes(*SHARD_BYTES))
    monkeypatch.setattr(cache, "TASK_MISSING", TASK_ROWS)


@pytest.fixture
def pictures(tmp_path):
    """A folder of 90 pictures, of which 78 have captions and can be used."""
    source, draws = tmp_path / "source", np.random.default_rng(0)
    source.mkdir()
    for number in range(90):
        Image.fromarray(draws.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(source / f"{number:02}.png")
        if number % 9:
            (source / f"{number:02}.txt").write_text(f"picture {number}")
    (source / "89.png").write_bytes(b"no picture")
    (source / "88.png").write_bytes((source / "10.png").read_bytes())
    return source


def prepare(source, out):
    changes = {"source": "folder", "path": str(source), "image_size": 32, "limit": None, "max_reject_fraction": 1.0}
    params = IngestParams(**load_params(ROOT / "params.yaml").ingest.model_dump() | changes)
    ingest(params, out / "images", out / "rejects.parquet", out / "near_duplicates.parquet", progress=False)


@pytest.mark.usefixtures("small_shards")
def test_stages_leave_the_same_bytes_as_in_one_process(monkeypatch, pictures, tmp_path):
    made = []
    for engine in ("local", "ray"):
        monkeypatch.setenv("LATENTLOOM_ENGINE", engine)
        out = tmp_path / engine
        prepare(pictures, out)
        images = encode_images(Vae("bundled"), out / "images", out / "latents", RowStore(out / ".state/a", 2**30))
        texts = encode_captions(
            TextEncoder("bundled"), out / "images", out / "text", RowStore(out / ".state/b", 2**30), tokens=True
        )
        assert images.encoded == texts.encoded == 78
        made.append(contents(out))
    assert len([name for name in made[0] if name.startswith("latents/0")]) > 2
    assert made[0].keys() == made[1].keys()
    assert [name for name in made[0] if made[0][name] != made[1][name]] == []


@pytest.mark.usefixtures("small_shards")
def test_a_rerun_after_the_driver_was_killed_computes_only_the_shards_that_were_not_finished(
    monkeypatch, pictures, tmp_path
):
    import ray

    monkeypatch.setenv("LATENTLOOM_ENGINE", "local")
    prepare(pictures, tmp_path)
    images, store = tmp_path / "images", tmp_path / "store"
    if engine_ray._idle:  # it has a core, which the driver needs
        ray.kill(engine_ray._idle.pop().actor)
    environment = os.environ | {"LATENTLOOM_ENGINE": "ray", "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen([sys.executable, "-c", DRIVER, images, tmp_path / "out", store], env=environment) as driver:
        try:
            encode_images(Vae("bundled"), images, tmp_path / "whole", RowStore(tmp_path / "local", 2**30))
            wait_until(lambda: driver.poll() is not None or finished(store))
        finally:
            driver.kill()
    assert driver.returncode == -9
    wait_until(lambda: ray.available_resources().get("CPU", 0) == 2 - len(engine_ray._idle))  # its workers have ended
    known = sum(len(load_shard(path)["mean"]) for path in finished(store))
    monkeypatch.setenv("LATENTLOOM_ENGINE", "ray")
    again = encode_images(Vae("bundled"), images, tmp_path / "out", RowStore(store, 2**30))
    assert 0 < known < 78
    assert (again.encoded, again.reused) == (78 - known, known)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def finished(store):
    return list(store.glob("?" * 64 + ".safetensors"))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_until(condition):
    until = time.monotonic() + 300  # where a machine has much else to do, workers start slowly
    while not condition():
        assert time.monotonic() < until, "waited for five minutes"
        time.sleep(0.01)
