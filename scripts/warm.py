"""Run a command whose Python processes start at once: forked from one that has imported much.

    python scripts/warm.py MODULE ... -- COMMAND ...

A notebook's kernel imports torch, pandas and seaborn, which takes longer than most notebooks of
scale smoke compute; the server of its worker processes does so again, and its runner imports
papermill. Here one process imports the modules while the command starts. ``NATLIB_PYTHON`` in the
command's environment names an executable that does what ``python -m MODULE``, ``python -c CODE``
and ``python FILE`` do, in a fork of that process: with the arguments, environment, folder and open
files of its caller. ``forked.py`` is what the caller starts: it forwards signals, and what it
started ends with it. All end with the command.

Without Linux, where alone such a fork is known to be safe, the command just runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

MOST_FILES = 250  # a message passes 253


class Server:
    """Forks this process for each caller; a connection stays open as long as its process runs."""

    def __init__(self, folder: str) -> None:
        self.launcher = f"{folder}/python"
        client = [sys.executable, "-IS", str(Path(__file__).with_name("forked.py")), folder]
        Path(self.launcher).write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
        Path(self.launcher).chmod(0o755)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{folder}/socket")
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.running: set[int] = set()

    def serve(self, command: subprocess.Popen[bytes]) -> list[str] | int:
        """Fork for callers until ``command`` ends; return its status, or in a fork what to run."""
        end = os.pidfd_open(command.pid)
        self.selector.register(end, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == end:
                    for pid in self.running:
                        os.kill(pid, signal.SIGKILL)
                    return command.wait()
                if key.fileobj is self.listener:
                    connection = self.listener.accept()[0]
                    try:
                        request, files = receive(connection)
                    except (OSError, ValueError):  # a caller that was killed while it asked
                        connection.close()
                        continue
                    if (pid := fork()) == 0:
                        command.returncode = 0  # not this process's child
                        self.selector.close()
                        self.listener.close()
                        connection.close()
                        return become(request, files, self.launcher)
                    for file in files:
                        os.close(file)
                    self.watch(pid, connection)
                elif key.data[0] in self.running:
                    self.ended(*key.data)

    def watch(self, pid: int, connection: socket.socket) -> None:
        """Wait for the end of a process and for its caller's."""
        about = (pid, os.pidfd_open(pid), connection)
        self.running.add(pid)
        for event in about[1:]:
            self.selector.register(event, selectors.EVENT_READ, about)
        with contextlib.suppress(OSError):
            connection.sendall(pid.to_bytes(4))

    def ended(self, pid: int, event: int, connection: socket.socket) -> None:
        """Tell the caller its process's status; where it was the caller that ended, kill it."""
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        with contextlib.suppress(OSError):
            connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, signed=True))
        self.running.remove(pid)
        self.selector.unregister(event)
        self.selector.unregister(connection)
        os.close(event)
        connection.close()


def fork() -> int:
    """Fork; libraries have threads by then, which do nothing before something is computed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read a caller's request and its open files."""
    size, files, _, _ = socket.recv_fds(connection, 4, MOST_FILES)
    with connection.makefile("rb") as stream:
        request: dict[str, Any] = json.loads(stream.read(int.from_bytes(size)))
    return request, files


def become(request: dict[str, Any], files: list[int], launcher: str) -> list[str]:
    """Turn this fork into what the caller would have started; return its arguments."""
    os.setsid()
    above = max(*files, *request["files"]) + 1
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(moved, request["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream.isatty())  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # a new process has a state of its own
    # What multiprocessing starts (the server of worker processes) is forked in the same way.
    multiprocessing.set_executable(launcher)
    arguments: list[str] = request["arguments"]
    while arguments[0].startswith("-") and arguments[0] not in ("-c", "-m"):
        arguments.pop(0)  # the interpreter's options are those of this process
    return arguments


def run(arguments: list[str]) -> None:
    """Do what the interpreter does with ``-c CODE``, ``-m MODULE`` or ``FILE``."""
    match arguments:
        case ["-c", code, *rest]:
            sys.argv, sys.path[0] = ["-c", *rest], ""
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), main.__dict__)
        case ["-m", module, *rest]:
            sys.argv, sys.path[0] = [module, *rest], os.getcwd()
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [file, *_]:
            sys.argv, sys.path[0] = arguments, str(Path(file).resolve().parent)
            runpy.run_path(file, run_name="__main__")


def main() -> None:
    """Run the command line."""
    split = sys.argv.index("--")
    modules, command = sys.argv[1:split], sys.argv[split + 1 :]
    if sys.platform != "linux" or not modules:
        os.execvp(command[0], command)
    folder = tempfile.mkdtemp(prefix="nat-")
    server = Server(folder)
    process = subprocess.Popen(command, env={**os.environ, "NATLIB_PYTHON": server.launcher})
    # From a terminal it reaches the command as well, which ends when it sees fit.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in modules:
        with contextlib.suppress(ImportError):  # the notebook that imports it will say so
            importlib.import_module(module)
    if pandas := sys.modules.get("pandas"):
        pandas.set_option(
            "display.max_columns", 20
        )  # as it does by itself where a kernel imports it
    gc.freeze()  # or each fork's collections would write to, and so copy, all of it
    outcome = server.serve(process)
    if isinstance(outcome, list):
        run(outcome)
    else:
        shutil.rmtree(folder)
        sys.exit(outcome if outcome >= 0 else 128 - outcome)


if __name__ == "__main__":
    main()
