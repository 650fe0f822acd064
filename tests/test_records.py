from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natlib import NatlibError, records, sources
from natlib.records import Record, Run, RunStore, as_json, read_all, read_record
from tests import record_bodies as bodies
from tests.record_bodies import Inner, Marked, Walk

PLAIN = {"recipe": 1, "data": ""}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs", checkpoint_seconds=0)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Say whether a process runs (one that ended and was not waited for does not)."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# --- keys -------------------------------------------------------------------------------------


def test_key_changes_with_everything_that_determines_the_result(store: RunStore) -> None:
    base = {"config": Walk(), "recipe": 1, "data": "abc", "inputs": {"supernet": "0"}}
    changes = [
        {},
        {"config": Walk(seed=1)},
        {"config": Walk(inner=Inner(width=4))},
        {"recipe": 2},
        {"data": "abd"},
        {"inputs": {"supernet": "1"}},
        {"inputs": None},
    ]
    keys = [store.key("walk", **{**base, **change}) for change in changes]
    keys.append(store.key("stroll", **base))
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 16 for key in keys)


def test_key_does_not_change_with_the_store_or_the_order_of_inputs(tmp_path: Path) -> None:
    one, two = RunStore(tmp_path), RunStore(tmp_path / "b", threads=4, fresh_since=9)
    arguments = {"config": Walk(), "recipe": 1, "data": ""}
    key = one.key("walk", inputs={"a": "1", "b": "2"}, **arguments)
    assert key == two.key("walk", inputs={"b": "2", "a": "1"}, **arguments)


def test_key_tells_classes_with_equal_fields_apart(store: RunStore) -> None:
    @dataclass(frozen=True)
    class Outer:
        width: int = 3
        names: tuple[str, ...] = ("a", "b")

    keys = {store.key("k", c, recipe=1, data="", inputs=None) for c in (Inner(), Outer())}
    assert len(keys) == 2


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values)
def test_plain_json_is_its_own_json(value: object) -> None:
    assert as_json(value) == value
    assert json.loads(json.dumps(as_json(value))) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, {1, 2}, b"x", torch.ones(1)])
def test_what_json_cannot_hold_is_refused_by_name(value: object) -> None:
    with pytest.raises(NatlibError, match="configuration"):
        as_json([value])


@pytest.mark.parametrize(("kind", "config"), [("No spaces", Walk()), ("walk", {"seed": 1})])
def test_bad_kind_or_config_is_refused(store: RunStore, kind: str, config: object) -> None:
    with pytest.raises(NatlibError, match=r"No spaces|dataclass"):
        store.run(kind, config, bodies.walk, **PLAIN)


# --- records ----------------------------------------------------------------------------------


def test_a_record_is_computed_once_and_read_back_equal(store: RunStore, tmp_path: Path) -> None:
    config = Marked(str(tmp_path))
    first = store.run("mark", config, bodies.mark, inputs={"a": "1"}, **PLAIN)
    second = store.run("mark", config, bodies.mark, inputs={"a": "1"}, **PLAIN)
    assert first == second
    assert second.config == {"type": "Marked", "folder": str(tmp_path), "seed": 0, "seconds": 0.0}
    assert second.inputs == {"a": "1"}
    assert len(list(tmp_path.glob("0-*"))) == 1
    assert [r.key for r in read_all(store.root)] == [first.key]


def test_the_source_is_that_of_the_code_that_ran(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files that change under a running body make another hash when it ends.
    # What is edited while a process runs is not what it runs.
    monkeypatch.setattr(sources, "module_hash", lambda _: "on disk by now")
    monkeypatch.setattr(sources, "loaded_hash", lambda _: "loaded")
    record = store.run("walk", Walk(), bodies.walk, **PLAIN)
    assert record.provenance["source"] == "loaded"
    assert records.current_source(record) == "on disk by now"


def test_the_loaded_source_is_that_on_disk_until_it_is_edited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = sources.loaded_hash("natlib.zoo")
    assert loaded == sources.module_hash("natlib.zoo")
    edited = {p: c + b"x = 1\n" if p.name == "zoo.py" else c for p, c in sources.LOADED.items()}
    monkeypatch.setattr(sources, "LOADED", edited)
    assert sources.loaded_hash("natlib.zoo") != loaded


def test_a_record_that_is_not_fresh_is_gone_before_its_files_are_written(
    tmp_path: Path,
) -> None:
    old = RunStore(tmp_path).run("walk", Walk(), bodies.walk, **PLAIN)
    later = RunStore(tmp_path, fresh_since=time.time() + 60)

    def interrupted(run: Run) -> dict[str, Any]:
        assert not old.path.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        later.run("walk", Walk(), interrupted, **PLAIN)
    assert RunStore(tmp_path).find("walk", old.key) is None


def test_recorded_results_are_recalled_from_any_scale_all_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = RunStore(tmp_path / "there").run_many(
        "walk", [Walk(0), Walk(1)], bodies.walk, workers=1, **PLAIN
    )
    for scale, part in (("extended", made[:1]), ("reduced", made[1:])):
        folder = tmp_path / "results" / "reference" / scale
        folder.mkdir(parents=True)
        (folder / "records.json").write_text(json.dumps([r.content for r in part]))
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)
    manifest = tmp_path / "manifest"
    monkeypatch.setenv("NATLIB_MANIFEST", str(manifest))
    store = RunStore(tmp_path / "here")

    def recall(*seeds: int) -> tuple[list[Record], str]:
        return store.run_or_recall(
            "walk", [Walk(seed) for seed in seeds], bodies.walk, workers=1, scale="extended",
            lacking="the table is away", **PLAIN,
        )  # fmt: skip

    found, said = recall(1, 0)
    assert [r.key for r in found] == [made[1].key, made[0].key]
    assert said == "our recorded results, because the table is away"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert lines == [{"kind": "walk", "key": r.key, "recalled": True} for r in found]
    assert recall(0, 1, 2) == ([], "nothing to show yet, because the table is away")


def test_provenance_says_what_made_the_record(store: RunStore) -> None:
    provenance = store.run("walk", Walk(), bodies.walk, **PLAIN).provenance
    assert provenance["body"] == "tests.record_bodies:walk"
    assert provenance["threads"] == 1
    assert provenance["torch"] == torch.__version__
    assert provenance["peak_memory_mb"] > 10
    assert provenance["resumed"] == 0
    assert provenance["started"] < provenance["finished"]


def test_a_result_that_json_cannot_hold_leaves_no_record(store: RunStore) -> None:
    with pytest.raises(NatlibError, match="result of walk cannot be recorded"):
        store.run("walk", Walk(), bodies.not_json, **PLAIN)
    assert list(read_all(store.root)) == []


def test_a_damaged_record_is_an_error_that_names_it(store: RunStore) -> None:
    record = store.run("walk", Walk(), bodies.walk, **PLAIN)
    text = record.path.read_text()
    record.path.write_text(text[: len(text) // 2])
    with pytest.raises(NatlibError, match=f"{record.path} cannot be read.*delete"):
        store.run("walk", Walk(), bodies.walk, **PLAIN)
    assert record.path.read_text() == text[: len(text) // 2]


@pytest.mark.parametrize("damage", ["[]", "null", "config", "finished"])
def test_a_record_that_is_another_one_is_damaged(store: RunStore, damage: str) -> None:
    record = store.run("walk", Walk(), bodies.walk, **PLAIN)
    content = json.loads(record.path.read_text())
    if damage == "config":
        content["config"]["seed"] += 1  # edited by hand: its key stands for another
    elif damage == "finished":
        del content["provenance"]["finished"]
    record.path.write_text(damage if damage in ("[]", "null") else json.dumps(content))
    with pytest.raises(NatlibError, match=f"{record.path} cannot be read.*delete"):
        store.run("walk", Walk(), bodies.walk, **PLAIN)


def test_artifacts_are_verified(store: RunStore) -> None:
    record = store.run("walk", Walk(), bodies.walk, **PLAIN)
    assert record.load("end")["position"].tolist() == record.result["end"]
    with pytest.raises(NatlibError, match="no artifact 'weights'; it has: end, middle"):
        record.artifact("weights")
    file = record.artifact("end")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(NatlibError, match=f"{file} is not the file that was recorded"):
        record.artifact("end")
    file.unlink()
    with pytest.raises(NatlibError, match=f"{file} is missing"):
        record.artifact("end")


def test_fresh_ignores_older_records_and_checkpoints_once(store: RunStore, tmp_path: Path) -> None:
    config = Marked(str(tmp_path))
    old = store.run("mark", config, bodies.mark, **PLAIN)
    (old.path.parent / "checkpoint.pt").write_bytes(b"of an earlier run")
    time.sleep(0.01)
    fresh = replace(store, fresh_since=time.time())
    time.sleep(0.01)
    new = fresh.run("mark", config, bodies.mark, **PLAIN)
    assert new.key == old.key
    assert new.provenance["started"] > old.provenance["finished"]
    assert fresh.run("mark", config, bodies.mark, **PLAIN) == new


def test_default_store_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("NATLIB_FRESH", "FRESH", "NATLIB_THREADS", "NATLIB_RUNS"):
        monkeypatch.delenv(name, raising=False)
    assert RunStore.default() == RunStore(records.REPOSITORY / "runs")
    monkeypatch.setenv("NATLIB_RUNS", str(tmp_path))
    monkeypatch.setenv("FRESH", "1")
    monkeypatch.setenv("NATLIB_THREADS", "2")
    assert RunStore.default() == RunStore(tmp_path, fresh_since=records.IMPORTED, threads=2)
    monkeypatch.setenv("NATLIB_FRESH", "12.5")
    assert RunStore.default().fresh_since == 12.5
    for name, value in {"NATLIB_THREADS": "0", "NATLIB_FRESH": "now"}.items():
        with monkeypatch.context() as patch, pytest.raises(NatlibError, match=f"{name}='{value}'"):
            patch.setenv(name, value)
            RunStore.default()


# --- resume -----------------------------------------------------------------------------------


def test_stopped_and_resumed_equals_uninterrupted(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Walk(fail_at=13)
    with pytest.raises(NatlibError, match="told to fail at step 13; while computing walk"):
        store.run("walk", config, bodies.walk, **PLAIN)
    monkeypatch.setenv("TEST_NO_FAIL", "1")
    resumed = store.run("walk", config, bodies.walk, **PLAIN)
    whole = RunStore(tmp_path / "other").run("walk", config, bodies.walk, **PLAIN)
    assert resumed.provenance["resumed"] == 1
    assert resumed.result == whole.result
    assert resumed.artifact("end").read_bytes() == whole.artifact("end").read_bytes()
    assert set(resumed.artifacts) == {"end", "middle"}
    assert not (resumed.path.parent / "checkpoint.pt").exists()


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_checkpoint_is_an_error_that_names_it(store: RunStore, keep: int) -> None:
    config = Walk(fail_at=13)
    with pytest.raises(NatlibError):
        store.run("walk", config, bodies.walk, **PLAIN)
    (file,) = store.root.glob("walk/*/checkpoint.pt")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(NatlibError, match=f"checkpoint {file} cannot be read.*delete it"):
        store.run("walk", config, bodies.walk, **PLAIN)
    assert list(read_all(store.root)) == []


def test_a_checkpoint_of_another_configuration_is_refused(store: RunStore) -> None:
    configs = [Walk(seed=seed, fail_at=5) for seed in (1, 2)]
    for config in configs:
        with pytest.raises(NatlibError, match="told to fail"):
            store.run("walk", config, bodies.walk, **PLAIN)
    keys = [store.key("walk", config, inputs=None, **PLAIN) for config in configs]
    one, two = (store.root / "walk" / key / "checkpoint.pt" for key in keys)
    two.write_bytes(one.read_bytes())
    with pytest.raises(NatlibError, match=f"{two} is of another .*{keys[0]}, expected {keys[1]}"):
        store.run("walk", configs[1], bodies.walk, **PLAIN)


def test_checkpoints_are_due_after_their_time(tmp_path: Path) -> None:
    seldom = RunStore(tmp_path).run("walk", Walk(), bodies.walk, **PLAIN)
    assert "middle" not in seldom.artifacts


# --- many ---------------------------------------------------------------------------------------


def test_many_records_do_not_depend_on_workers(store: RunStore, tmp_path: Path) -> None:
    configs = [Walk(seed=s) for s in (3, 1, 2, 1)]
    two = store.run_many("walk", configs, bodies.walk, workers=2, **PLAIN)
    alone = replace(store, root=tmp_path / "one")
    one = alone.run_many("walk", configs, bodies.walk, workers=1, **PLAIN)
    assert [r.config["seed"] for r in two] == [3, 1, 2, 1]
    assert [r.key for r in two] == [r.key for r in one]
    assert [r.result for r in two] == [r.result for r in one]
    assert [r.artifacts for r in two] == [r.artifacts for r in one]  # the same bytes
    assert {r.provenance["threads"] for r in one + two} == {1}
    assert store.run_many("walk", configs, bodies.walk, workers=1, **PLAIN) == two


def test_threads_are_set_for_the_body_only(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    record = RunStore(tmp_path, threads=before + 1).run("walk", Walk(), bodies.walk, **PLAIN)
    assert record.result["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_one_failure_keeps_the_other_records(store: RunStore, workers: int) -> None:
    configs = [Walk(seed=s) for s in range(4)]
    with pytest.raises(RuntimeError, match="odd seed") as caught:
        store.run_many("odd", configs, bodies.fail_on_odd, workers=workers, **PLAIN)
    (note,) = caught.value.__notes__
    assert "2 of 4 failed" in note
    assert "Walk(seed=" in note
    assert sorted(r.result["seed"] for r in read_all(store.root)) == [0, 2]


def test_many_refuses_what_it_cannot_do(store: RunStore) -> None:
    with pytest.raises(NatlibError, match="workers=0"):
        store.run_many("walk", [Walk()], bodies.walk, workers=0, **PLAIN)
    with pytest.raises(NatlibError, match="top level of a module"):
        store.run_many("walk", [Walk()], lambda run: {}, workers=1, **PLAIN)


# --- processes that end -------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from natlib.records import RunStore
from tests import record_bodies as bodies
root, marks, seconds, workers = sys.argv[1:]
if __name__ == "__main__":
    configs = [bodies.Marked(marks, seed, float(seconds)) for seed in range(int(workers))]
    RunStore(Path(root)).run_many(
        "mark", configs, bodies.mark, workers=int(workers), recipe=1, data=""
    )
    print("done", flush=True)
"""


def start(tmp_path: Path, *, seconds: float, workers: int) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    marks = tmp_path / "marks"
    marks.mkdir(exist_ok=True)
    # The marks' folder is part of the key: always the same one.
    command = [sys.executable, script, tmp_path / "runs", marks, str(seconds), str(workers)]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=records.REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(records.REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def worker_pids(tmp_path: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in (tmp_path / "marks").iterdir()]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(
    tmp_path: Path, sent: signal.Signals
) -> None:
    process = start(tmp_path, seconds=600, workers=2)
    wait_until(lambda: len(worker_pids(tmp_path)) == 2)
    wait_until(lambda: len(list((tmp_path / "runs").glob("mark/*/checkpoint.pt"))) == 2)
    pids = worker_pids(tmp_path)
    assert all(map(alive, pids))
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    wait_until(lambda: not any(map(alive, pids)))
    if sent == signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt")
    assert list(read_all(tmp_path / "runs")) == []

    again = start(tmp_path, seconds=600, workers=2)
    assert again.communicate(timeout=120)[0] == "done\n"
    assert all(record.result["resumed"] for record in read_all(tmp_path / "runs"))


def test_a_killed_worker_is_one_clear_error(tmp_path: Path) -> None:
    process = start(tmp_path, seconds=600, workers=2)
    wait_until(lambda: len(worker_pids(tmp_path)) == 2)
    os.kill(worker_pids(tmp_path)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert "NatlibError: a worker process for mark ended before it was done" in errors
    wait_until(lambda: not any(map(alive, worker_pids(tmp_path))))


def test_two_processes_compute_a_record_once(tmp_path: Path) -> None:
    both = [start(tmp_path, seconds=1, workers=1) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["done\n", "done\n"]
    assert len(worker_pids(tmp_path)) == 1


# --- what the runner reads ------------------------------------------------------------------------


def test_progress_and_manifest_go_to_the_files_of_the_environment(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, manifest = tmp_path / "progress", tmp_path / "manifest"
    monkeypatch.setenv("NATLIB_PROGRESS", str(progress))
    monkeypatch.setenv("NATLIB_MANIFEST", str(manifest))
    configs = [Walk(seed=s) for s in range(3)]
    found = store.run_many("walk", configs, bodies.walk, workers=2, **PLAIN)
    store.run("walk", configs[0], bodies.walk, **PLAIN)

    lines = [json.loads(line) for line in progress.read_text().splitlines()]
    assert [(e["done"], e["total"]) for e in lines if e["task"] == "walk"] == [
        (0, 3),
        (1, 3),
        (2, 3),
        (3, 3),
    ]
    ends = {e["task"] for e in lines if e["done"] == e["total"] == 20}
    assert ends == {f"walk {r.key[:6]} seed {s}" for s, r in enumerate(found)}
    used = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [e["key"] for e in used] == [r.key for r in found] + [found[0].key]


def test_nothing_is_printed(store: RunStore, capfd: pytest.CaptureFixture[str]) -> None:
    store.run_many("walk", [Walk(), Walk(1)], bodies.walk, workers=2, **PLAIN)
    assert capfd.readouterr() == ("", "")


def test_reference_records_are_read(store: RunStore, tmp_path: Path) -> None:
    assert records.read_reference("reduced", tmp_path) == []
    record = store.run("walk", Walk(), bodies.walk, **PLAIN)
    path = tmp_path / "results" / "reference" / "reduced" / "records.json"
    path.parent.mkdir(parents=True)
    path.write_text(f"[{record.path.read_text()}]")
    (read,) = records.read_reference("reduced", tmp_path)
    assert read == replace(record, path=path)
    path.write_text("[{}]")
    with pytest.raises(NatlibError, match=f"{path} cannot be read"):
        records.read_reference("reduced", tmp_path)
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "none.json")


# --- sources ----------------------------------------------------------------------------------


def package(root: Path, **modules: str) -> Path:
    folder = root / "natlib"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text("")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder


def test_source_hash_follows_code_and_imports_only(tmp_path: Path) -> None:
    one = 'def f():\n    """Say."""\n    from natlib.b import g\n    return g()\n'
    folder = package(tmp_path, a=one, b="def g():\n    return 1\n", c="x = 1\n")

    def now() -> str:
        return sources.module_hash("natlib.a", folder)

    before = now()
    assert [p.stem for p in sources.module_files(["natlib.a"], folder)] == ["__init__", "a", "b"]
    package(tmp_path, a="# comment\n" + one.replace("Say.", "Said.").replace("    r", "\n    r"))
    package(tmp_path, c="x = 2\n")
    assert now() == before
    package(tmp_path, b="def g():\n    return 2\n")
    assert now() != before
    before = now()
    (folder / "b.json").write_text("{}")
    assert now() != before


@pytest.mark.parametrize(
    ("statement", "modules"),
    [
        ("import natlib.b", {"b"}),
        ("from natlib import b as x", {"b"}),
        ("from natlib.b import g", {"b"}),
        ("if True:\n    from natlib import b, c", {"b", "c"}),
        ("import numpy.linalg", set()),
        ("natlib = 'natlib.b'", set()),
    ],
)
def test_imports_are_found(tmp_path: Path, statement: str, modules: set[str]) -> None:
    folder = package(tmp_path, b="", c="")
    files = sources.module_files(sources.imported_names(statement), folder)
    assert {p.stem for p in files} - {"__init__"} == modules
