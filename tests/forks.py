"""``python -m MODULE`` as a fork of a process that has imported everything: on a busy core that takes ten times as long as a
tiny run.

The ranks that Lightning starts with ``--trainer.devices N`` are forked, too: by the first of them, before it does anything.

What differs from a process of its own: hashes of strings are seeded, and addresses laid out, once for each starter (there are
two, by turns, so that a run and its resumption, or two ranks, still differ); what reads the environment when Python starts or
a module is imported saw the starter's; ``sys.stdout`` is never a terminal; Lightning's ranks have hashes alike. What concerns
these starts Python in earnest (in `tests.test_cli`, `tests.test_scripts`).
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[1]
_LENGTH = struct.Struct("!q")
_SECONDS_TO_IMPORT = 300


# In the tests' process


class _Starter:
    """A process that forks, for as long as this one lives."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._socket = ours
        self._socket.settimeout(_SECONDS_TO_IMPORT)
        atexit.register(self.close)

    def start(self, request: dict[str, Any], files: Sequence[int]) -> tuple[int, socket.socket]:
        """Process id, and a socket that its exit status will come through."""
        ours, theirs = socket.socketpair()
        ours.settimeout(_SECONDS_TO_IMPORT)
        message = json.dumps(request).encode()
        with theirs:
            socket.send_fds(self._socket, [_LENGTH.pack(len(message))], [theirs.fileno(), *files])
        self._socket.sendall(message)
        return _number(ours), ours

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._socket.close()
        self._process.wait(60)


_starters: dict[int, _Starter] = {}
_turns = itertools.count()
_starting = threading.Lock()


class Process:
    """As `subprocess.Popen`, as far as tests need it."""

    def __init__(
        self, command: Sequence[Any], *, env: dict[str, str], cwd: Any = None, stdout: int | None = None,
        stderr: int | None = None, text: bool = False, start_new_session: bool = False,
    ) -> None:  # fmt: skip
        """``command``: a module and its arguments."""
        self.args = [str(word) for word in command]
        self.returncode: int | None = None
        files, close = [], []
        for target, number in ((stdout, 1), (stderr, 2)):
            pipe = None
            if target == subprocess.PIPE:
                read, write = os.pipe()
                close.append(write)
                pipe = os.fdopen(read, "r" if text else "rb")
            elif target == subprocess.STDOUT:
                write = files[-1]
            elif target == subprocess.DEVNULL:
                write = os.open(os.devnull, os.O_WRONLY)
                close.append(write)
            else:
                write = number if target is None else target
            files.append(write)
            setattr(self, ("stdout", "stderr")[number - 1], pipe)
        request = {
            "command": self.args, "env": env, "cwd": os.fspath(cwd or os.getcwd()), "session": start_new_session,
        }  # fmt: skip
        try:
            with _starting:
                which = next(_turns) % 2
                if which not in _starters or not _starters[which].is_alive():
                    _starters[which] = _Starter()
                self.pid, self._ended = _starters[which].start(request, files)
        finally:
            for descriptor in close:
                os.close(descriptor)

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._ended.settimeout(None if timeout is None else max(timeout, 1e-3))
            try:
                self.returncode = _number(self._ended)
            except TimeoutError:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._ended.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        found: dict[str, Any] = {"stdout": None, "stderr": None}

        def read(name: str, pipe: Any) -> None:
            with pipe:
                found[name] = pipe.read()

        pipes = {name: pipe for name in found if (pipe := getattr(self, name)) is not None}
        readers = [threading.Thread(target=read, args=item, daemon=True) for item in pipes.items()]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():  # a process that it left holds the pipe
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
        return found["stdout"], found["stderr"]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(command: Sequence[Any], *, timeout: float, **kwargs: Any) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run` with ``capture_output``."""
    process = Process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _number(connection: socket.socket) -> int:
    (number,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return int(number)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise EOFError("the process that forks has ended")
        data += more
    return data


# In the starter


def serve(control: socket.socket) -> dict[str, Any]:
    """Forks for each request; returns it in the child, and ends with the tests' process."""
    children: dict[int, tuple[int, socket.socket]] = {}
    starter = os.getpid()
    try:
        return _serve(control, children)
    finally:
        if os.getpid() == starter:
            for pid, _ in children.values():
                os.kill(pid, signal.SIGKILL)


def _serve(control: socket.socket, children: dict[int, tuple[int, socket.socket]]) -> dict[str, Any]:
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is control:
                head, descriptors, _, _ = socket.recv_fds(control, _LENGTH.size, 3)
                if not head:
                    raise SystemExit(0)
                request = json.loads(_exactly(control, _LENGTH.unpack(head)[0]))
                connection = socket.socket(fileno=descriptors[0])
                pid = os.fork()
                if pid == 0:
                    for other in (selector, control, connection, *(c for _, c in children.values())):
                        other.close()
                    for descriptor in children:
                        os.close(descriptor)
                    for number, descriptor in enumerate(descriptors[1:], 1):
                        os.dup2(descriptor, number)
                    for descriptor in descriptors[1:]:
                        os.close(descriptor)
                    return dict(request)
                for descriptor in descriptors[1:]:
                    os.close(descriptor)
                ended = os.pidfd_open(pid)
                children[ended] = pid, connection
                selector.register(ended, selectors.EVENT_READ)
                selector.register(connection, selectors.EVENT_READ)
                with suppress(OSError):  # who asked is gone, which the selector says next
                    connection.sendall(_LENGTH.pack(pid))
            elif key.fileobj in children:
                ended = key.fd
                pid, connection = children.pop(ended)
                _, status = os.waitpid(pid, 0)
                for fileobj in (ended, connection):
                    if fileobj in selector.get_map():
                        selector.unregister(fileobj)
                with suppress(OSError):  # nobody waits
                    connection.sendall(_LENGTH.pack(os.waitstatus_to_exitcode(status)))
                connection.close()
                os.close(ended)
            elif (
                isinstance(key.fileobj, socket.socket) and key.fileobj.fileno() >= 0
            ):  # open yet: who started it is gone
                selector.unregister(key.fileobj)
                for pid, connection in children.values():
                    if connection is key.fileobj:
                        os.kill(pid, signal.SIGKILL)


class _Rank:
    """As `subprocess.Popen`, as far as Lightning's launcher needs it: a process that waits for its environment."""

    waiting: ClassVar[list[tuple[int, int]]] = []
    """Process ids, and where each reads what it was waiting for."""

    def __init__(self, command: Sequence[str], *, env: dict[str, str], cwd: str | None) -> None:
        assert cwd is None, "only hydra has another"
        self.args = command
        self.returncode: int | None = None
        self._looking = threading.Lock()
        self.pid, pipe = self.waiting.pop(0)
        with os.fdopen(pipe, "w") as file:
            json.dump(env, file)

    def poll(self) -> int | None:
        with self._looking:  # Lightning's observer looks from a thread of its own
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _fork_ranks(request: dict[str, Any]) -> None:
    """In each of them, returns once it is wanted, with its environment in the request."""
    _, *words = request["command"]
    if "--trainer.devices" not in words or "RANK" in request["env"]:
        return
    for _ in range(int(words[words.index("--trainer.devices") + 1]) - 1):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            for _, other in [(0, write), *_Rank.waiting]:
                os.close(other)
            try:
                with os.fdopen(read) as pipe:
                    environment = pipe.read()
            except KeyboardInterrupt:
                environment = ""
            if not environment:  # the first rank ended without it
                os._exit(0)
            request["env"] = json.loads(environment)
            return
        os.close(read)
        _Rank.waiting.append((pid, write))
    launcher = sys.modules["lightning.pytorch.strategies.launchers.subprocess_script"]
    launcher.subprocess = SimpleNamespace(Popen=_Rank)  # type: ignore[attr-defined]


def become(request: dict[str, Any]) -> None:
    """Runs the module as ``python -m`` would."""
    if request["session"]:
        os.setsid()
    _fork_ranks(request)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if "numpy" in sys.modules:  # torch's generator and Python's are seeded anew by themselves, or by whoever needs it
        sys.modules["numpy"].random.seed()
    paths = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[0] = request["cwd"]
    sys.path[1:1] = [path for path in paths if path not in sys.path]
    module, *arguments = request["command"]
    sys.argv[:] = [module, *arguments]
    for name in (module, f"{module}.__main__"):  # if the starter imported what is to run
        if not hasattr(sys.modules.get(name), "__path__"):
            sys.modules.pop(name, None)
    status, interrupted = 0, False
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        traceback.print_exc()
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    # As Python ends, but for taking apart all modules, which are the starter's, too: that would copy its memory.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def main() -> None:
    import tests.test_resume  # noqa: F401

    control = socket.socket(fileno=int(sys.argv[1]))
    # Another thread's locks would stay locked in a child.
    assert len(os.listdir("/proc/self/task")) == 1, "imports have started a thread"
    become(serve(control))


if __name__ == "__main__":
    main()
