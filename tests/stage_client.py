"""What the tests' ``python`` runs for a stage: hands it to the server of stages, and ends as the stage does.

Needs the standard library alone, and is started as ``python -SI`` so that it is there in a moment.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

PATIENCE = 300  # seconds until the server must have made its imports, which the first run ever compiles


def connect(path: str) -> socket.socket:
    """A connection to the server, as soon as it is there."""
    deadline = time.monotonic() + PATIENCE
    while True:
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(path)
            return server
        except (FileNotFoundError, ConnectionRefusedError):
            server.close()
            if time.monotonic() > deadline:
                sys.exit(f"the server of stages at {path} does not answer")
            time.sleep(0.05)


def request(server: socket.socket, files: list[int], **what: object) -> int:
    """Ask for a stage; its process id.

    Args:
        server: a new connection.
        files: what become its standard input, output and error.
        what: ``argv``, ``folder``, ``environment`` and ``hooks``.
    """
    socket.send_fds(server, [b"\n"], files)
    server.sendall(json.dumps(what).encode() + b"\n")
    return read_number(server)


def read_number(server: socket.socket) -> int:
    """The next line that the server sends."""
    line = b""
    while not line.endswith(b"\n"):
        byte = server.recv(1)
        if not byte:
            raise ConnectionError("the server of stages has gone")
        line += byte
    return int(line)


def main() -> None:
    """``stage_client.py SOCKET SCRIPT...``: run the script and end with its exit status, or by its signal.

    ``STAGE_HOOKS`` in the environment has hooks as JSON.
    """
    server = connect(sys.argv[1])
    environment = dict(os.environ)
    hooks = json.loads(environment.get("STAGE_HOOKS", "{}"))
    pid = request(server, [0, 1, 2], argv=sys.argv[2:], folder=str(Path.cwd()), environment=environment, hooks=hooks)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: os.kill(pid, received))
    status = read_number(server)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
