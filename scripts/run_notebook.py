"""Execute one notebook with checked parameters and put the result where the book reads it.

The notebook runs in this environment's own interpreter, in the current folder. It is executed into
a file apart, which replaces the old result only when every cell succeeded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from experiments import (
    EXECUTED,
    RUNS,
    STATE,
    check_parameters,
    chosen_dataset,
    code_hash,
    declared_parameters,
    exit_with,
    parameters_at,
    read_experiments,
    read_notebook,
    write_text,
)
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbclient.util import run_sync
from papermill.exceptions import PapermillExecutionError

from natlib.files import locked


class OwnKernel(AsyncKernelManager):
    """A kernel of this very interpreter, whatever kernels are installed on the machine."""

    @property
    def kernel_spec(self) -> Any:
        """What to start."""
        python = os.environ.get("NATLIB_PYTHON", sys.executable)  # see warm.py
        command = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


class Progress:
    """One line that says how far the notebook is: in place on a terminal, else every 30 s."""

    def __init__(self, name: str, cells: int, expected: float, file: Path) -> None:
        self.name = name
        self.cells = cells
        self.cell = 0
        self.expected = expected
        self.file = file
        self.started = time.time()
        self.live = sys.stdout.isatty() and " -j" not in os.environ.get("MAKEFLAGS", "")
        self.groups: dict[str, tuple[float, float, float]] = {}
        self.tasks: dict[str, float] = {}
        self.offset = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> Progress:
        about = f" (about {clock(self.expected)})" if self.expected else ""
        self.show(f"started{about}", last=not self.live)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def watch(self) -> None:
        """Show the line again and again until the notebook has ended."""
        while not self.stop.wait(1 if self.live else 30):
            self.show(self.line(), last=not self.live)

    def show(self, text: str, *, last: bool = True) -> None:
        """Print the line; ``last`` ends it, so that the next one does not overwrite it."""
        start = "\r\033[K" if self.live else ""
        width = shutil.get_terminal_size().columns - 1 if self.live else 1000
        print(f"{start}{f'{self.name}  {text}'[:width]}", end="\n" if last else "", flush=True)

    def line(self) -> str:
        """Return the line's text: elapsed and remaining time, the cell, the work in it."""
        self.read()
        elapsed = time.time() - self.started
        left = self.expected - elapsed
        parts = [f"cell {self.cell} of {self.cells}"]
        for group, (done, total, since) in self.groups.items():
            if done >= total:
                continue
            running = [share for task, share in self.tasks.items() if task.startswith(f"{group} ")]
            share = min(1.0, (done + sum(s for s in running if s < 1)) / total)
            parts.append(f"{group} {done:g} of {total:g} ({share:.0%})")
            if share > 0.02:
                left = max(left, (time.time() - since) * (1 - share) / share)
        remaining = [f"about {clock(left)} left"] if left > 0 else []
        return ", ".join([f"{clock(elapsed)} elapsed", *remaining, *parts])

    def read(self) -> None:
        """Read what natlib reported since the last time."""
        if not self.file.exists():
            return
        with self.file.open() as stream:
            stream.seek(self.offset)
            for line in iter(stream.readline, ""):
                if not line.endswith("\n"):
                    break
                self.offset += len(line.encode())
                event = json.loads(line)
                task, done, total = event["task"], event["done"], event["total"]
                if " " in task:
                    self.tasks[task] = done / total if total else 1.0
                else:
                    since = event["time"] if done == 0 else self.groups[task][2]
                    self.groups[task] = (done, total, since)


def clock(seconds: float) -> str:
    """Return ``seconds`` as minutes and seconds, or hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def execute(source: Path, target: Path, parameters: dict[str, Any], progress: Progress) -> None:
    """Execute ``source`` into ``target`` with papermill; the kernel is gone when this returns."""
    with tempfile.TemporaryDirectory(prefix="nat-") as folder:
        # Sockets and IPython's own files live in this folder, and nothing of the user's is read.
        os.environ.pop("JUPYTER_PATH", None)
        os.environ["IPYTHONDIR"] = folder
        kernel = OwnKernel(transport="ipc", connection_file=f"{folder}/kernel.json")

        def note_cell(cell: Any, cell_index: int) -> None:
            progress.cell = cell_index + 1

        try:
            papermill.execute_notebook(
                source,
                target,
                parameters=parameters,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                km=kernel,
                on_cell_start=note_cell,
            )
        finally:
            if kernel.has_kernel:
                run_sync(kernel.shutdown_kernel)(now=True)


def describe(error: PapermillExecutionError | DeadKernelError) -> str:
    """Return what a user needs of a failure: a NatlibError's message, else cell and traceback."""
    if isinstance(error, DeadKernelError):
        return "the kernel ended (killed, or out of memory?); the same command goes on"
    if error.ename == "NatlibError":
        return str(error.evalue)
    traceback = "\n".join(error.traceback)
    if not sys.stderr.isatty():
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", traceback)
    return f"in cell {error.cell_index + 1}:\n{traceback}"


def finish(partial: Path, target: Path, source: Any, about: dict[str, Any]) -> None:
    """Put the executed notebook in place, with what it was executed as instead of papermill's."""
    notebook = read_notebook(partial)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
    notebook.metadata["natlib"] = {"code": code_hash(source), **about}
    write_text(target, nbformat.writes(notebook))
    partial.unlink()


def end_with_make(outermost: int) -> None:
    """End this process soon after a make that it runs under was killed; the kernel follows."""
    parent = os.getppid()

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            while os.getppid() == parent:
                os.kill(outermost, 0)  # sends nothing, fails when there is no such process
                time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(name: str, target: Path, parameters: dict[str, Any], expected: float) -> int:
    """Run notebook ``name`` into ``target``, showing progress; return the exit status."""
    path = Path("notebooks") / f"{name}.ipynb"
    source = read_notebook(path)
    check_parameters(source, parameters, name)
    work = STATE / "executing" / target.stem
    with locked(work):  # a second run of the same notebook waits
        partial, report, manifest = (work / n for n in ("partial.ipynb", "progress", "manifest"))
        for file in (partial, report, manifest):
            file.unlink(missing_ok=True)
        os.environ["NATLIB_PROGRESS"] = str(report.resolve())
        os.environ["NATLIB_MANIFEST"] = str(manifest.resolve())
        progress = Progress(target.stem, len(source.cells) + 1, expected, report)
        try:
            with progress:
                execute(path, partial, parameters, progress)
        except KeyboardInterrupt:
            progress.show("stopped; type the same command again to go on")
            return 130
        except (PapermillExecutionError, DeadKernelError) as error:
            progress.show(f"failed after {clock(time.time() - progress.started)}")
            failed = RUNS / "failed" / target.name
            failed.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(partial, failed)
            print(f"error: {name}: {describe(error)}", file=sys.stderr)
            print(f"(executed so far: {failed})", file=sys.stderr)
            return 1
        seconds = time.time() - progress.started
        about = {"scale": parameters["scale"], "dataset": parameters["dataset"]}
        finish(partial, target, source, {**about, "seconds": round(seconds, 1)})
        if target.parent == EXECUTED:
            lines = manifest.read_text().splitlines() if manifest.exists() else []
            used = list({line: json.loads(line) for line in lines}.values())
            text = json.dumps(used, indent=1) + "\n"
            write_text(RUNS / "manifests" / parameters["scale"] / f"{name}.json", text)
    progress.show(f"done in {clock(seconds)}")
    return 0


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="the notebook, without folder and .ipynb")
    parser.add_argument("--scale", required=True)
    parser.add_argument("--dataset", help="default: the one that scripts/dataset.py chose")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--set", action="append", default=[], metavar="PARAMETER=VALUE")
    parser.add_argument("--output", type=Path, help="default: book/executed/NAME.ipynb")
    arguments = parser.parse_args()
    if make := os.environ.get("NATLIB_MAKE"):
        end_with_make(int(make))

    name, scale = arguments.name, arguments.scale
    experiments = read_experiments()
    parameters = {
        "scale": scale,
        "dataset": arguments.dataset or chosen_dataset()["name"],
        "workers": arguments.workers,
        **parameters_at(experiments, name, scale),
    }
    declared = declared_parameters(read_notebook(Path("notebooks") / f"{name}.ipynb"), name)
    for assignment in arguments.set:
        parameter, _, value = assignment.partition("=")
        # Text is taken as it stands: YAML would cut a path at " #".
        text = parameter in declared and isinstance(declared[parameter][1], str)
        parameters[parameter] = value if text else yaml.safe_load(value)
    target = arguments.output or EXECUTED / f"{name}.ipynb"
    return run(name, target, parameters, 60 * experiments[name].minutes.get(scale, 0))


if __name__ == "__main__":
    exit_with(main)
