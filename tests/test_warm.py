"""Processes forked from a warm one: they are as if started, and end with who started them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere processes are started, not forked"
)


def warm(command: str, folder: Path, *modules: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command under the warm process."""
    return subprocess.run(
        [sys.executable, SCRIPTS / "warm.py", *(modules or ["json"]), "--", "bash", "-c", command],
        cwd=folder,
        input="from standard input",
        capture_output=True,
        text=True,
        timeout=100,
    )


def written(file: Path) -> str:
    """Wait until ``file`` has been written, and read it."""
    for _ in range(1000):
        if file.exists() and (text := file.read_text()).endswith("\n"):
            return text
        time.sleep(0.02)
    raise AssertionError(f"{file} was not written")


def wait_for_the_end(pid: int) -> None:
    """Return when there is no process ``pid``."""
    for _ in range(1000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")


SHOW = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ["FRUIT"], __name__, sys.path[0],
                  sys.stdin.read(), sorted(os.listdir("/proc/self/fd"))[:3]]))
print("to standard error", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("way", ["-c", "-m", "file"])
def test_a_forked_process_is_as_if_started(way: str, tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    (below / "show.py").write_text(SHOW)
    arguments = {"-c": ["-c", SHOW], "-m": ["-m", "show"], "file": ["show.py"]}[way]
    rest = shlex.join([*arguments, "one", "two words"])

    def shell(python: str) -> str:
        return f"cd below; echo input | FRUIT=pear {python} -B {rest}; echo status $?"

    started = warm(shell(sys.executable), tmp_path)
    forked = warm(shell("$NATLIB_PYTHON"), tmp_path)
    assert "status 3" in started.stdout
    assert forked.stdout == started.stdout
    assert forked.stderr == started.stderr == "to standard error\n"


def test_modules_are_there_already_and_a_missing_one_is_no_error(tmp_path: Path) -> None:
    code = "import sys; print('colorsys' in sys.modules, 'wave' in sys.modules)"
    done = warm(f'$NATLIB_PYTHON -c "{code}"', tmp_path, "colorsys", "no_such_module")
    assert (done.stdout, done.stderr) == ("True False\n", "")


def test_the_outcome_is_the_commands(tmp_path: Path) -> None:
    assert warm("exit 7", tmp_path).returncode == 7
    assert warm("kill -TERM $$", tmp_path).returncode == 128 + signal.SIGTERM
    killed = warm("$NATLIB_PYTHON -c 'import os; os.kill(os.getpid(), 9)'; echo $?", tmp_path)
    assert killed.stdout == f"{128 + signal.SIGKILL}\n"


def test_without_modules_nothing_is_forked(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPTS / "warm.py", "--", "bash", "-c", "echo ${NATLIB_PYTHON-no}"]
    assert subprocess.check_output(command, text=True) == "no\n"


SLEEP = """
import os, pathlib, sys, time
try:
    pathlib.Path("pid").write_text(f"{os.getpid()}\\n")
    time.sleep(100)
except KeyboardInterrupt:
    sys.exit(9)
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 9), (signal.SIGTERM, 143), (signal.SIGKILL, 137)]
)
def test_signals_reach_the_process(number: signal.Signals, status: int, tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text(SLEEP)
    shell = f"""
        $NATLIB_PYTHON sleep.py & caller=$!
        until [ -s pid ]; do sleep 0.05; done
        kill -{number.value} $caller
        wait $caller; echo $?
        while kill -0 $(cat pid) 2> /dev/null; do sleep 0.05; done
    """
    done = warm(shell, tmp_path)
    assert done.stdout == f"{status}\n"


@pytest.mark.parametrize("killed", ["command", "server", "who called"])
def test_no_process_is_left_behind(killed: str, tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text(SLEEP)
    call = 'bash -c "echo \\$\\$ > caller; $NATLIB_PYTHON sleep.py; true"'
    command = ["bash", "-c", f"echo $$ > command; {call}; true"]
    server = subprocess.Popen(
        [sys.executable, SCRIPTS / "warm.py", "json", "--", *command], cwd=tmp_path
    )
    pid = int(written(tmp_path / "pid"))
    shell, caller = (int(written(tmp_path / name)) for name in ("command", "caller"))
    os.kill({"command": shell, "server": server.pid, "who called": caller}[killed], signal.SIGKILL)
    wait_for_the_end(pid)
    server.wait(20)
    wait_for_the_end(caller)


POOL = """
import math, multiprocessing, os
from concurrent.futures import ProcessPoolExecutor

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        print(*pool.map(math.factorial, range(8)))
        print(pool.submit(os.getpid).result() == os.getpid())
"""


def test_worker_processes_of_a_forked_process_compute(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    done = warm("$NATLIB_PYTHON pool.py", tmp_path)
    assert done.stderr == ""
    assert done.stdout == "1 1 2 6 24 120 720 5040\nFalse\n"
