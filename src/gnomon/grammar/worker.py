"""Compiling what strangers send: in a process that can be killed, within a time and an amount of memory.

One helper process (`python -m gnomon.grammar.worker`) has everything loaded and forks a child for each grammar; the
child answers with a Plan, or dies of its own alarm or memory limit. So a schema that takes forever costs the server one
thread that waits. Several children may run at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from gnomon.errors import GrammarError
from gnomon.grammar.plans import Arguments, Plan, make, plan_of

SECONDS = 5.0
MEGABYTES = 1024
WARMTH: dict[str, Any] = {"schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}


class Worker:
    """The server's side. seconds, megabytes: what one grammar may take."""

    def __init__(self, seconds: float = SECONDS, megabytes: int = MEGABYTES) -> None:
        self.seconds = seconds
        self.megabytes = megabytes
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def plan(self, arguments: Arguments, seconds: float | None = None) -> Plan:
        """Compile in a child. seconds: in place of the worker's own. Raises GrammarError, also when it takes too long
        or too much."""
        seconds = self.seconds if seconds is None else seconds
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with mine:
            with theirs:
                self._hand_over(theirs)
            job = {"arguments": arguments, "seconds": seconds, "megabytes": self.megabytes}
            mine.settimeout(seconds + 5)
            with contextlib.suppress(OSError):  # a child that is gone already says so by its silence
                mine.sendall(json.dumps(job).encode())
                mine.shutdown(socket.SHUT_WR)
            return self._answer(_received(mine), seconds)

    def _answer(self, raw: bytes, seconds: float) -> Plan:
        if not raw:
            raise GrammarError(
                f"Compiling the grammar took more than {seconds:g} s or {self.megabytes} MB: it is refused.",
                hint="Make it smaller: fewer alternatives, shorter repetitions, simpler patterns.",
                param="grammar",
            )
        answer = json.loads(raw)
        if "error" in answer:
            raise GrammarError(**answer["error"])
        return Plan.model_validate(answer["plan"])

    def _hand_over(self, end: socket.socket) -> None:
        """Give a job's socket to the helper, which is started when there is none (or none any more)."""
        with self._lock:
            for _ in range(2):
                if self._helper is None or self._helper.poll() is not None:
                    self._start()
                assert self._control is not None
                try:
                    socket.send_fds(self._control, [b"j"], [end.fileno()])
                    return
                except OSError:
                    self._stop()
        raise GrammarError("The process that compiles grammars cannot be started.", param="grammar")

    def _start(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            command = [sys.executable, "-m", "gnomon.grammar.worker", str(theirs.fileno())]
            self._helper = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._control = mine

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._helper is not None:
            self._helper.kill()
            self._helper.wait()
        self._helper = self._control = None

    def close(self) -> None:
        with self._lock:
            self._stop()


def _received(end: socket.socket) -> bytes:
    pieces = []
    try:
        while piece := end.recv(1 << 16):
            pieces.append(piece)
    except OSError:
        return b""
    return b"".join(pieces)


# -- the helper's side ----------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> None:
    """Fork a child for each socket that comes; end with the server."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    plan_of(make(WARMTH))
    while True:
        message, ends, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _child(socket.socket(fileno=ends[0]))
        os.close(ends[0])


def _child(end: socket.socket) -> NoReturn:
    """One grammar, then the end; whatever happens, no code of the helper runs after it."""
    try:
        job = json.loads(_received(end))
        _limit(job["seconds"], job["megabytes"])
        end.sendall(json.dumps(_worked(job["arguments"])).encode())
    except (MemoryError, OSError):
        pass  # silence is the answer: too large, or nobody listens
    finally:
        os._exit(0)


def _worked(arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"plan": plan_of(make(arguments)).model_dump()}
    except GrammarError as error:
        return {"error": {"message": error.message, "hint": error.hint, "param": error.param}}
    except RecursionError:
        return {"error": {"message": "The grammar is nested too deep.", "param": "grammar"}}


def _limit(seconds: float, megabytes: int) -> None:
    """From here on an alarm or the allocator ends this process, inside any library."""
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere the time alone is limited
        held = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = held + megabytes * 1024 * 1024
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
