"""Ray behind `latentloom.engine.ordered_map`: the same results in the same order, from workers on many machines.

    the driver (the stage)                          a worker (an actor, a process of its own)
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
import hashlib
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from latentloom import engine
from latentloom.errors import UserError, lacks_memory
from latentloom.files import atomic_path

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
COPIES = 8  # files of the driver that are kept in Ray's memory, and on a machine without the project's disk
LOOK_FOR_NODES = 2.0  # seconds between two looks
PATIENCE = 600.0  # seconds without a worker
LIBRARIES = ("numpy", "pillow", "torch", "diffusers", "transformers", "pyarrow", "resvg-py")  # decide the bytes
FORWARDED = ("LATENTLOOM_", "HF_", "OMP_", "TORCH_")  # variables that workers get from the driver
SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD")
LOST = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError)
LOST += (ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError, ray.exceptions.RuntimeEnvSetupError)


@dataclass
class Failure:
    """An error that a function raised, in place of a result."""

    error: Exception
    trace: str

    @property
    def of_memory(self) -> bool:
        return lacks_memory(self.error)


@dataclass
class Chunk:
    """Items that follow one another, and what has come of them."""

    items: list[Any]
    outcomes: dict[int, Any] = field(default_factory=dict)
    node: str = ""  # where the last of them was computed

    @property
    def complete(self) -> bool:
        return len(self.outcomes) == len(self.items)


@dataclass
class Call:
    """Some items of a chunk, to be computed by one worker."""

    chunk: Chunk
    places: list[int]
    tries: int = 0
    deaths: int = 0  # of workers that computed it
    failed_on: set[str] = field(default_factory=set)

    @property
    def items(self) -> list[Any]:
        return [self.chunk.items[place] for place in self.places]

    def alone(self) -> list["Call"]:
        """Each item by itself, so that one which fails takes no other with it."""
        return [replace(self, places=[place], failed_on=set(self.failed_on)) for place in self.places]


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
    writes, reads = _files(first)
    with _probe(*(Path(path).parent for path in (*writes, *reads)[:1])) as probe:
        crew = Crew(function, setup, probe)
        try:
            for chunk in _in_order(crew, _chunks(first, items, 1 if setup or writes or reads else ITEMS_OF_A_CALL)):
                for place, item in enumerate(chunk.items):
                    outcome = chunk.outcomes[place]
                    if isinstance(outcome, Failure):
                        if not isinstance(outcome.error, UserError):
                            outcome.error.add_note(f"from a worker of Ray on {chunk.node}:\n{outcome.trace}")
                        raise outcome.error
                    if again and again(outcome):
                        outcome = function(item)
                    yield outcome
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
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": "warning"}
    if address:
        # Every machine runs this very code, whatever is installed there.
        options |= {"address": address}
        options["runtime_env"] = {
            "env_vars": environment,
            "py_modules": [str(package)],
            "excludes": ["showcase", "__pycache__"],
        }
    else:
        path = os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")]))
        options |= {"num_cpus": engine.worker_count(), "include_dashboard": False}
        options["runtime_env"] = {"env_vars": environment | {"PYTHONPATH": path}}
    try:
        ray.init(**options)
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
        self._job = ray.put((function, setup, Path.cwd(), probe, _versions()))
        self._seats: list[Seat] = []
        self._most: dict[str, int] = {}  # of workers on a machine where memory did not suffice
        self._on_gpu: bool | None = None
        self._broken: dict[str, Exception] = {}  # machines where no worker starts, or no state can be made
        self._failed_starts: Counter[str] = Counter()
        self._copies: OrderedDict[tuple[Path, int, int], Any] = OrderedDict()
        self._waiting: deque[Call] = deque()
        self._looked, self._had_workers = -LOOK_FOR_NODES, time.monotonic()
        self._hire()

    @property
    def size(self) -> int:
        """The workers that have started or will."""
        return len(self._seats)

    def add(self, chunk: Chunk) -> None:
        """Have the items of a chunk computed."""
        self._waiting.append(Call(chunk, list(range(len(chunk.items)))))

    def work(self, block: bool) -> None:
        """Hand out calls, and take in what has come back; with ``block``, wait for something to happen."""
        if time.monotonic() - self._looked > LOOK_FOR_NODES:
            self._hire()
        self._hand_out()
        references = [seat.starting for seat in self._seats if seat.sees_disk is None]
        references += [reference for seat in self._seats for reference, _ in seat.calls]
        if not references:
            if block:
                time.sleep(0.1)
            return
        done, _ = ray.wait(
            references, num_returns=len(references) if not block else 1, timeout=1.0 if block else 0, fetch_local=False
        )
        for reference in done:
            seat = next((own for own in self._seats if own.starting == reference), None)
            if seat is not None and seat.sees_disk is None:
                self._started(seat)
                continue
            for seat in list(self._seats):
                for own, call in list(seat.calls):
                    if own == reference:
                        self._take_in(seat, own, call)
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
            actor = Worker.options(num_cpus=kind[0], num_gpus=kind[1], scheduling_strategy=strategy).remote()
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
            if not {seat.node for seat in self._seats} - call.failed_on:
                call.failed_on = set()  # the other machines are gone
            # At the end none waits at a worker while another is idle.
            most = CALLS_AT_A_WORKER if len(self._waiting) >= len(self._seats) else 1
            free = [seat for seat in self._seats if seat.sees_disk is not None and len(seat.calls) < most]
            free = [seat for seat in free if seat.node not in call.failed_on]
            if not free:
                self._waiting.append(call)
                continue
            seat = min(free, key=lambda own: len(own.calls))
            reads = [] if seat.sees_disk else [path for item in call.items for path in _files(item)[1]]
            inputs = {path: self._copy(path) for path in reads}
            seat.calls.append((seat.actor.work.remote(call.items, inputs, call.deaths), call))

    def _take_in(self, seat: Seat, reference: Any, call: Call) -> None:
        try:
            outcomes, written = ray.get(reference)
        except LOST as error:
            self._lost(seat, error)
            return
        seat.calls.remove((reference, call))
        for path, content in written.items():
            with atomic_path(path, room=len(content)) as temporary:
                temporary.write_bytes(content)
        call.chunk.node = seat.host
        failure = outcomes.pop() if isinstance(outcomes[-1], Failure) else None
        for place, outcome in zip(call.places, outcomes, strict=False):
            call.chunk.outcomes[place] = outcome
            for path in _files(call.chunk.items[place])[0] if seat.sees_disk else ():
                _wait_for(Path(path))
        if failure:
            place, *rest = call.places[len(outcomes) :]
            if rest:
                self._waiting.appendleft(replace(call, places=rest))
            failed = replace(call, places=[place], tries=call.tries + 1, failed_on=call.failed_on | {seat.node})
            self._failed(seat, failed, failure)

    def _failed(self, seat: Seat, call: Call, failure: Failure) -> None:
        """Try an item somewhere else, or again with more memory; else its error is what comes of it."""
        others = {own.node for own in self._seats} - call.failed_on
        if failure.of_memory and call.tries < TRIES:
            self._halve(seat)
            call.failed_on = set()
            self._waiting.appendleft(call)
        elif others and call.tries < 2:
            _say(f"{_named(call.items[0])}: {failure.error} on {seat.host}; it is tried on another machine")
            self._waiting.appendleft(call)
        else:
            if failure.of_memory:
                failure.error.add_note(f"{_named(call.items[0])} did not fit into memory {TRIES} times")
            call.chunk.outcomes[call.places[0]] = failure

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
        for call in reversed(calls[1:]):
            self._waiting.appendleft(call)
        for call in calls[:1]:
            call.tries, call.deaths = call.tries + 1, call.deaths + 1
            if call.tries >= TRIES and len(call.places) == 1:
                raise UserError(
                    f"{_named(call.items[0])}: each of {TRIES} workers of Ray that computed it died, the last on "
                    f"{seat.host} ({_first_line(error)}). The memory may not suffice, or a library crashes on it"
                ) from error
            self._waiting.extendleft(reversed(call.alone()))
        self._hire()

    def _dismiss(self, seat: Seat) -> None:
        self._seats.remove(seat)
        ray.kill(seat.actor)

    def _copy(self, path: Path) -> Any:
        """A file's bytes in Ray's memory, where all workers of a machine share them."""
        status = Path(path).stat()
        key = (path, status.st_size, status.st_mtime_ns)
        if key not in self._copies:
            self._copies[key] = ray.put(Path(path).read_bytes())
            if len(self._copies) > COPIES:
                self._copies.popitem(last=False)
        self._copies.move_to_end(key)
        return self._copies[key]


def share(resources: dict[str, float], with_state: bool, on_gpu: bool) -> tuple[int, tuple[int, int]]:
    """How many workers a machine has, and how many cores and GPUs each."""
    cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if on_gpu:
        return gpus, (min(CORES_OF_A_GPU, cores // max(gpus, 1)), 1)
    if not with_state or not cores:
        return cores, (1, 0)
    count = max(1, min(cores, int(resources.get("memory", 0) // MEMORY_OF_A_STATE)))
    return count, (cores // count, 0)


@ray.remote(max_restarts=0, max_task_retries=0)
class Worker:
    """Computes items on one machine, one after another."""

    def start(self, job: tuple[Any, ...], cores: int) -> "bool | Failure":
        """Make the state; say whether the project's disk is seen."""
        self._function, setup, folder, probe, versions = job
        self._state: Any = None
        self._scratch: Path | None = None
        os.environ[engine.WORKERS] = str(cores)
        with contextlib.suppress(OSError):
            os.chdir(folder)  # the stage's paths are relative to it
        try:
            if other := [f"{name} {own}" for name, own in _versions().items() if own != versions[name]]:
                wanted = [f"{name} {own}" for name, own in versions.items() if own != _versions()[name]]
                raise UserError(f"it has {', '.join(other)}, the stage {', '.join(wanted)}")
            if probe is not None and not probe.is_file():
                self._scratch = Path(tempfile.mkdtemp(prefix="latentloom-"))
            if setup is not None:
                self._state = setup()
                self._function = partial(self._function, self._state)
        except Exception as error:
            return _failure(error)
        return self._scratch is None

    def leave(self) -> None:
        """Forget the state, and the copies of files."""
        self._function = self._state = None
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def work(self, items: Sequence[Any], inputs: dict[Path, Any], deaths: int) -> tuple[list[Any], dict[Path, bytes]]:
        """What comes of items, up to the first that fails; and the files they wrote, where the driver has to."""
        if deaths and hasattr(self._state, "halve_batches"):
            self._state.halve_batches(deaths)
        outcomes, written = [], {}
        for item in items:
            try:
                if self._scratch:
                    self._bring(item, inputs)
                outcomes.append(self._function(item))
                if self._scratch:
                    for path in _files(item)[0]:
                        copy = engine.here(path)
                        written[path] = copy.read_bytes()
                        copy.unlink()
            except Exception as error:
                outcomes.append(_failure(error))
                break
        return outcomes, written

    def _bring(self, item: Any, inputs: dict[Path, Any]) -> None:
        writes, reads = _files(item)
        engine._copies.clear()
        for path in (*reads, *writes):
            folder = self._scratch / hashlib.sha256(str(path).encode()).hexdigest()[:16]
            folder.mkdir(exist_ok=True)
            engine._copies[path] = folder / Path(path).name
        for path in reads:
            copy = engine.here(path)
            if not copy.exists():
                copy.write_bytes(ray.get(inputs[path]))
        kept = sorted(self._scratch.iterdir(), key=lambda own: own.stat().st_mtime_ns)
        used = {copy.parent for copy in engine._copies.values()}
        for folder in [own for own in kept if own not in used][: max(len(kept) - COPIES, 0)]:
            shutil.rmtree(folder)


def _in_order(crew: Crew, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    under_way: deque[Chunk] = deque()
    more = True
    while more or under_way:
        while more and len(under_way) < max(crew.size, 1) * CALLS_AHEAD:
            if (chunk := next(chunks, None)) is None:
                more = False
                break
            under_way.append(chunk)
            crew.add(chunk)
        ready = bool(under_way) and under_way[0].complete
        crew.work(block=not ready and bool(under_way))
        if ready:
            yield under_way.popleft()


def _chunks(first: Any, items: Iterator[Any], size: int) -> Iterator[Chunk]:
    head = [first, *islice(items, size - 1)]
    while head:
        yield Chunk(head)
        head = list(islice(items, size))


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


def _files(item: Any) -> tuple[Sequence[Path], Sequence[Path]]:
    return getattr(item, "writes", ()), getattr(item, "reads", ())


def _wait_for(path: Path) -> None:
    """Until a file that another machine wrote is seen here: a disk of a network may be told late."""
    until = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > until:
            raise UserError(f"{path} was written on another machine and is not seen here after 60 s")
        list(path.parent.iterdir())  # which has a network's disk look again
        time.sleep(0.2)


def _failure(error: Exception) -> Failure:
    trace = traceback.format_exc()
    try:
        ray.cloudpickle.loads(ray.cloudpickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.__traceback__ = None
    return Failure(error, trace)


def _versions() -> dict[str, str]:
    versions = {"Python": ".".join(map(str, sys.version_info[:2]))}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "(none)"
    return versions


def _named(item: Any) -> str:
    text = str(item)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _say(line: str) -> None:
    print(f"ray: {line}", file=sys.stderr, flush=True)
