"""Ray behind `latentloom.engine.ordered_map`: the same results in the same order, from workers on many machines.

    the driver (the stage)                          a worker (an actor: `latentloom.engine_worker`)
    reads items, at most a window ahead   call ->   makes its state once, computes the items of a call
    gives results in the items' order     <- back   results, or the error of the first item that failed

``RAY_ADDRESS`` names a cluster to join; without it, one is made of this machine's cores and GPUs, for as long as the
stage runs. Functions of an item alone get a worker per core, and a call has several items. Functions with a state get a
worker per GPU where the cluster has any, and machines without are left aside, for they would compute other last bits;
else a worker per core, as far as there are `MEMORY_OF_A_STATE` for each.

Whether a machine sees the project's disk is found out, and said, for each: the driver leaves a file with a random name
where the items write, and each worker looks for it. Where it is not seen, files travel as bytes (`engine.here`).

What fails:

    a worker dies, or its machine   Its calls go to others, and another worker starts if the machine is there. Mostly
                                    memory did not suffice, though nothing says so: the item it was at is computed
                                    in half of the encoder's batch, after another death in a quarter. An item that was
                                    being computed `TRIES` times when a worker died ends the run, by name.
    memory does not suffice         Half of the machine's workers end, so that those left have twice as much, and the
                                    item is computed again. That changes no bytes. (Before that, an encoder halves its
                                    batch: `encoding.fitting_batches`.)
    an item raises an error         It is computed on another machine, if there is one. The error of the second machine
                                    is the item's own, and comes in its place.
"""

import contextlib
import os
import re
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from latentloom import engine
from latentloom.engine_worker import COPIES, Failure, Worker, files_of, versions_of_libraries
from latentloom.errors import UserError, notify
from latentloom.files import write_bytes

try:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a worker without a GPU leaves the variable alone
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ModuleNotFoundError as missing:
    if missing.name != "ray":
        raise
    raise UserError(
        'LATENTLOOM_ENGINE=ray needs Ray, which is not installed: pip install "latentloom[ray]", or unset the variable'
    ) from missing

MEMORY_OF_A_STATE = 2 * 2**30  # bytes, of a worker with an encoder; two on a core each do more than one on two
CORES_OF_A_GPU = 8  # at most, to decode beside it
ITEMS_OF_A_CALL = 32  # small items: a call costs a millisecond
CALLS_AT_A_WORKER = 2  # one that is computed, and one that waits: it never idles
CALLS_AHEAD = 4  # per worker, whose results may wait for one before them
TRIES = 3
LOOK_FOR_NODES = 2.0  # seconds between two looks
PATIENCE = 600.0  # seconds without a worker
FORWARDED = ("LATENTLOOM_", "HF_", "OMP_", "TORCH_")  # variables that workers get from the driver
SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD")
LOST = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError)
LOST += (ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError, ray.exceptions.RuntimeEnvSetupError)
WORKER = ray.remote(max_restarts=0, max_task_retries=0)(Worker)


@dataclass(eq=False)
class Task:
    """An item, what it went through, and what has come of it once it is ``done``."""

    item: Any
    outcome: Any = None
    done: bool = False
    host: str = ""  # where it was computed
    tries: int = 0
    deaths: int = 0  # of workers that computed it
    failed_on: set[str] = field(default_factory=set)

    def end(self, outcome: Any, host: str) -> None:
        """Take in what has come of the item."""
        self.outcome, self.host, self.done = outcome, host, True


Call = list[Task]  # for one worker, one after the other; what was tried before is a call by itself


@dataclass(eq=False)
class Seat:
    """A worker as the driver sees it; ``sees_disk`` is None until it has started."""

    actor: Any
    node: str
    host: str
    kind: tuple[int, int]  # cores and GPUs
    calls: deque[tuple[Any, Call]] = field(default_factory=deque)  # by reference of what comes back, the oldest first
    starting: Any = None
    sees_disk: bool | None = None


_idle: list[Seat] = []  # workers that wait for the next crew
_said: set[str] = set()


def ray_map(
    function: Callable[..., Any],
    items: Iterable[Any],
    setup: Callable[[], Any] | None,
    again: Callable[[Any], bool] | None,
) -> Iterator[Any]:
    """As `latentloom.engine.ordered_map`."""
    items = iter(items)
    first = next(items, None)
    if first is None:
        return
    connect()
    writes, reads = files_of(first)
    calls = _calls(chain([first], items), 1 if setup or writes or reads else ITEMS_OF_A_CALL)
    with _probe(*(Path(path).parent for path in (*writes, *reads)[:1])) as probe:
        crew = Crew(function, setup, probe)
        try:
            for task in _in_order(crew, calls):
                outcome = task.outcome
                if isinstance(outcome, Failure):
                    if not isinstance(outcome.error, UserError):
                        outcome.error.add_note(f"from a worker of Ray on {task.host}:\n{outcome.trace}")
                    raise outcome.error
                yield function(task.item) if again and again(outcome) else outcome
        finally:
            crew.dismiss()


def connect() -> None:
    """Join the cluster at ``RAY_ADDRESS``, or make one of this machine; once per process.

    Raises:
        UserError: when there is none at that address.
    """
    if ray.is_initialized():
        return
    _idle.clear()  # of a cluster that was left
    address = os.environ.get("RAY_ADDRESS") or None
    package = Path(engine.__file__).parent
    environment = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    environment = {name: value for name, value in environment.items() if not SECRET.search(name)}  # Ray shows them
    if environment.get("LATENTLOOM_DEVICE", "").startswith("cuda"):
        environment["LATENTLOOM_DEVICE"] = "cuda"  # which of them, Ray says
    environment |= {engine.VARIABLE: "local", "TQDM_DISABLE": "1"}
    if address:  # every machine runs this very code, whatever is installed there
        cluster = {"address": address}
        code = {"py_modules": [str(package)], "excludes": ["showcase", "__pycache__"]}
    else:
        cluster, code = {"num_cpus": engine.worker_count(), "include_dashboard": False}, {}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")]))
    runtime = {"env_vars": environment, **code}
    try:
        ray.init(**cluster, runtime_env=runtime, log_to_driver=True, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        if not address:
            raise
        raise UserError(f"RAY_ADDRESS={address}: no cluster of Ray can be joined there ({error})") from error


class Crew:
    """The workers of a run, on the machines that are there, and which call is with whom.

    Args:
        function, setup: of `latentloom.engine.ordered_map`.
        probe: the file by which a worker knows the project's disk; None where no file is read or written.
    """

    def __init__(self, function: Callable[..., Any], setup: Callable[[], Any] | None, probe: Path | None) -> None:
        self._probe, self._with_state = probe, setup is not None
        self._job = ray.put((function, setup, Path.cwd(), probe, versions_of_libraries()))
        self._seats: list[Seat] = []
        self._most: dict[str, int] = {}  # of workers on a machine where memory did not suffice
        self._on_gpu: bool | None = None
        self._broken: dict[str, Exception] = {}  # machines where no worker starts, or no state can be made
        self._failed_starts: Counter[str] = Counter()
        self._copies = lru_cache(COPIES)(lambda path, *_: ray.put(path.read_bytes()))
        self._waiting: deque[Call] = deque()
        self._looked, self._had_workers = -LOOK_FOR_NODES, time.monotonic()
        self._hire()

    @property
    def size(self) -> int:
        """The workers that have started or will."""
        return len(self._seats)

    def add(self, call: Call) -> None:
        """Have the items of a call computed."""
        self._waiting.append(call)

    def work(self, block: bool) -> None:
        """Hand out calls, and take in what has come back; with ``block``, wait for something to happen."""
        if time.monotonic() - self._looked > LOOK_FOR_NODES:
            self._hire()
        self._hand_out()
        asked = [(seat, seat.starting, None) for seat in self._seats if seat.sees_disk is None]
        asked += [(seat, *given) for seat in self._seats for given in seat.calls]
        if not asked:
            if block:
                time.sleep(0.1)
            return
        references = [reference for _, reference, _ in asked]
        count, timeout = (1, 1.0) if block else (len(references), 0)
        done = set(ray.wait(references, num_returns=count, timeout=timeout, fetch_local=False)[0])
        for seat, reference, call in asked:
            if reference not in done or seat not in self._seats:  # it may have been dismissed just now
                continue
            if call is None:
                self._started(seat)
            else:
                self._take_in(seat, reference, call)
        self._hand_out()

    def dismiss(self) -> None:
        """Let all workers go: those that are idle and hold no GPU wait for the next crew of this process."""
        left = {seat.actor.leave.remote(): seat for seat in self._seats if not seat.calls and not seat.kind[1]}
        done = set(ray.wait(list(left), num_returns=len(left), timeout=5)[0]) if left else set()
        for reference, seat in left.items():
            if reference in done:
                with contextlib.suppress(*LOST):
                    ray.get(reference)
                    _idle.append(seat)
        for seat in self._seats:
            if seat not in _idle:
                ray.kill(seat.actor)
        self._seats.clear()

    def _hire(self) -> None:
        """A worker for each share of each machine that is there and has none."""
        self._looked = time.monotonic()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if self._on_gpu is None:  # for the whole run, whatever machines come and go
            wanted = self._with_state and not os.environ.get("LATENTLOOM_DEVICE", "").startswith("cpu")
            self._on_gpu = wanted and any(node["Resources"].get("GPU", 0) >= 1 for node in nodes)
        for node in nodes:
            name, host = node["NodeID"], node["NodeManagerHostname"]
            count, kind = share(node["Resources"], self._with_state, self._on_gpu)
            count = min(count, self._most.get(name, count)) if name not in self._broken else 0
            for _ in range(count - sum(seat.node == name for seat in self._seats)):
                self._seats.append(self._seat(name, host, kind))
        if any(seat.sees_disk is not None for seat in self._seats):
            self._had_workers = time.monotonic()
        elif self._seats and time.monotonic() - self._had_workers < PATIENCE:
            return
        elif self._broken:
            raise next(iter(self._broken.values()))
        elif time.monotonic() - self._had_workers > PATIENCE:
            raise UserError(
                f"Ray has had no machine with a free {'GPU' if self._on_gpu else 'core'} for {PATIENCE:.0f} s: look at "
                "`ray status`"
            )

    def _seat(self, node: str, host: str, kind: tuple[int, int]) -> Seat:
        seat = next((own for own in _idle if (own.node, own.kind) == (node, kind)), None)
        if seat is None:
            for other in [own for own in _idle if own.node == node and own.kind != kind]:
                _idle.remove(other)
                ray.kill(other.actor)  # it has the cores
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            actor = WORKER.options(num_cpus=kind[0], num_gpus=kind[1], scheduling_strategy=strategy).remote()
            seat = Seat(actor, node, host, kind)
        else:
            _idle.remove(seat)
        seat.sees_disk, seat.starting = None, seat.actor.start.remote(self._job, max(1, kind[0]))
        return seat

    def _started(self, seat: Seat) -> None:
        try:
            outcome = ray.get(seat.starting)
        except LOST as error:
            self._lost(seat, error)
            return
        if isinstance(outcome, Failure):
            # A model that does not load on this machine may do so on others.
            _say(f"{seat.host} is not used: {outcome.error}")
            self._broken[seat.node] = outcome.error
            self._dismiss(seat)
            return
        seat.sees_disk = outcome
        disk = "" if self._probe is None else f"; it sees {self._probe.parent}"
        if not outcome:
            disk = f"; it does not see {self._probe.parent}: files travel through Ray"
        line = f"{seat.host} (node {seat.node[:8]}) computes{disk}"
        if line not in _said:
            _said.add(line)
            _say(line)

    def _hand_out(self) -> None:
        for _ in range(len(self._waiting)):
            call = self._waiting.popleft()
            first = call[0]
            if not {seat.node for seat in self._seats} - first.failed_on:
                first.failed_on = set()  # the other machines are gone
            # At the end none waits at a worker while another is idle.
            most = CALLS_AT_A_WORKER if len(self._waiting) >= len(self._seats) else 1
            free = [seat for seat in self._seats if seat.sees_disk is not None and len(seat.calls) < most]
            free = [seat for seat in free if seat.node not in first.failed_on]
            if not free:
                self._waiting.append(call)
                continue
            seat = min(free, key=lambda own: len(own.calls))
            items = [task.item for task in call]
            reads = [] if seat.sees_disk else [path for item in items for path in files_of(item)[1]]
            inputs = {path: self._copy(Path(path)) for path in reads}
            seat.calls.append((seat.actor.work.remote(items, inputs, first.deaths), call))

    def _take_in(self, seat: Seat, reference: Any, call: Call) -> None:
        try:
            outcomes, written = ray.get(reference)
        except LOST as error:
            self._lost(seat, error)
            return
        seat.calls.remove((reference, call))
        for path, content in written.items():
            write_bytes(path, content)
        failure = outcomes.pop() if isinstance(outcomes[-1], Failure) else None
        for task, outcome in zip(call, outcomes, strict=False):
            task.end(outcome, seat.host)
            for path in files_of(task.item)[0] if seat.sees_disk else ():
                _wait_for(Path(path))
        if failure:
            failed, *rest = call[len(outcomes) :]
            if rest:
                self._waiting.appendleft(rest)
            failed.tries += 1
            failed.failed_on.add(seat.node)
            self._failed(seat, failed, failure)

    def _failed(self, seat: Seat, task: Task, failure: Failure) -> None:
        """Try an item somewhere else, or again with more memory; else its error is what comes of it."""
        others = {own.node for own in self._seats} - task.failed_on
        if failure.of_memory and task.tries < TRIES:
            self._halve(seat)
            task.failed_on = set()
            self._waiting.appendleft([task])
        elif others and task.tries < 2:
            _say(f"{_named(task.item)}: {failure.error} on {seat.host}; it is tried on another machine")
            self._waiting.appendleft([task])
        else:
            if failure.of_memory:
                failure.error.add_note(f"{_named(task.item)} did not fit into memory {TRIES} times")
            task.end(failure, seat.host)

    def _halve(self, seat: Seat) -> None:
        """End half of a machine's workers."""
        mates = [own for own in self._seats if own.node == seat.node]
        left = max(1, len(mates) // 2)
        if left < len(mates):
            self._most[seat.node] = left
            _say(f"memory does not suffice on {seat.host}: the workers there go from {len(mates)} to {left}")
            for own in [mate for mate in mates if mate is not seat][: len(mates) - left]:
                self._waiting.extendleft(call for _, call in own.calls)
                self._dismiss(own)

    def _lost(self, seat: Seat, error: Exception) -> None:
        """A worker is gone: what it had goes to others, the item it was at by itself."""
        _say(f"a worker on {seat.host} is gone ({_first_line(error)}); its items are computed again")
        if isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in str(error):
            self._halve(seat)
        if seat.sees_disk is None:
            self._failed_starts[seat.node] += 1
            if self._failed_starts[seat.node] >= TRIES:
                self._broken[seat.node] = UserError(f"no worker of Ray starts on {seat.host}: {error}")
        calls = [call for _, call in seat.calls]
        self._dismiss(seat)
        self._waiting.extendleft(reversed(calls[1:]))
        for task in reversed(calls[0] if calls else []):
            task.tries, task.deaths = task.tries + 1, task.deaths + 1
            if task.tries >= TRIES and len(calls[0]) == 1:
                raise UserError(
                    f"{_named(task.item)}: each of {TRIES} workers of Ray that computed it died, the last on "
                    f"{seat.host} ({_first_line(error)}). The memory may not suffice, or a library crashes on it"
                ) from error
            self._waiting.appendleft([task])
        self._hire()

    def _dismiss(self, seat: Seat) -> None:
        self._seats.remove(seat)
        ray.kill(seat.actor)

    def _copy(self, path: Path) -> Any:
        """A file's bytes in Ray's memory, where all workers of a machine share them."""
        status = path.stat()
        return self._copies(path, status.st_size, status.st_mtime_ns)


def share(resources: dict[str, float], with_state: bool, on_gpu: bool) -> tuple[int, tuple[int, int]]:
    """How many workers a machine has, and how many cores and GPUs each."""
    cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if on_gpu:
        return gpus, (min(CORES_OF_A_GPU, cores // max(gpus, 1)), 1)
    if not with_state or not cores:
        return cores, (1, 0)
    count = max(1, min(cores, int(resources.get("memory", 0) // MEMORY_OF_A_STATE)))
    return count, (cores // count, 0)


def _in_order(crew: Crew, calls: Iterator[Call]) -> Iterator[Task]:
    under_way: deque[Call] = deque()
    more = True
    while more or under_way:
        while more and len(under_way) < max(crew.size, 1) * CALLS_AHEAD:
            if (call := next(calls, None)) is None:
                more = False
                break
            under_way.append(call)
            crew.add(call)
        ready = bool(under_way) and all(task.done for task in under_way[0])
        crew.work(block=not ready and bool(under_way))
        if ready:
            yield from under_way.popleft()


def _calls(items: Iterator[Any], size: int) -> Iterator[Call]:
    while call := [Task(item) for item in islice(items, size)]:
        yield call


@contextlib.contextmanager
def _probe(folder: Path | None = None) -> Iterator[Path | None]:
    """A file with a random name where items write or read, for the workers to look for."""
    if folder is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{secrets.token_hex(16)}.tmp"
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _wait_for(path: Path) -> None:
    """Until a file that another machine wrote is seen here: a disk of a network may be told late."""
    until = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > until:
            raise UserError(f"{path} was written on another machine and is not seen here after 60 s")
        list(path.parent.iterdir())  # which has a network's disk look again
        time.sleep(0.2)


def _named(item: Any) -> str:
    text = str(item)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _say(line: str) -> None:
    notify(f"ray: {line}")
