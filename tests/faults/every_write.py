"""Runs a stage again and again, and breaks it at another step of its writing each time.

``every_write.py STAGE FAULT REFERENCE STRIDE`` is started by the server of stages in a copy of a finished project. It
makes the stage's imports once and forks each run, so that a run costs the stage's own work alone: MLflow is not there,
whose delivery has tests of its own. The faults are

- ``die``: the process ends right before a file gets its final name, and cleans nothing up;
- ``full``: the renaming, or the flush of the folder that follows it, fails with "No space left on device".

After each fault the outs must be whole or missing, and the rerun must end with the bytes of the ``REFERENCE`` project.
"""

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from projects import Project
from stage_hooks import DIED, die_at_write, fail_at_write, writes_done
from stages import is_whole, read_outs, remove_outs

FAULTS = {"die": die_at_write, "full": fail_at_write}
PRINTED = Path("../printed_by_run.txt")


def main(stage: str, fault: str, reference: Path, stride: int) -> None:
    """Break the stage at steps 1, 1 + stride, ...; print what a test asserts on as JSON: its steps, and what it met."""
    sys.modules["mlflow.tracking"] = None  # as where it is not installed
    script = runpy.run_path(f"pipelines/{stage}.py", run_name="stage")
    project = Project(Path.cwd())
    whole = read_outs(Project(reference), stage)

    def run(prepare: Callable[[], object]) -> int:
        remove_outs(project, stage)
        return forked(lambda: script["run_stage"](stage, script["main"]), prepare)

    steps, statuses, wrong = None, {}, []
    number = 1
    while steps is None or number <= steps:
        shutil.rmtree(".state", ignore_errors=True)
        if steps is None:
            assert run(lambda: FAULTS[fault](10**9)) == 0, PRINTED.read_text()
            steps = int(Path("../writes.txt").read_text())
            continue
        status = run(lambda number=number: FAULTS[fault](number))
        printed = PRINTED.read_text()
        statuses[status] = statuses.get(status, 0) + 1
        if fault == "full" and status and ("could not write" not in printed or "Traceback" in printed):
            wrong.append(f"step {number}: ended with {status} and printed {printed[-6000:]}")
        if fault == "die" and status != DIED:
            wrong.append(f"step {number}: ended with {status} and printed {printed[-6000:]}")
        for path, content in read_outs(project, stage).items():
            if not is_whole(path, content, whole[path]):
                wrong.append(f"step {number}: {path} was left with {len(content)} bytes")
        if status and run(lambda: None) != 0:
            wrong.append(f"step {number}: the rerun failed: {PRINTED.read_text()[-6000:]}")
        elif read_outs(project, stage) != whole:
            wrong.append(f"step {number}: the rerun ended with other bytes")
        number += stride
    print(json.dumps({"steps": steps, "statuses": statuses, "wrong": wrong}))


def forked(run: Callable[[], object], prepare: Callable[[], object]) -> int:
    """Run in a process of its own; its exit status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 0
    with open(PRINTED, "w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    try:
        prepare()
        run()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    Path("../writes.txt").write_text(str(writes_done()))
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
