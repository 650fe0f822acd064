from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from natlib import claims, natbench, proxy, records, tabular, train
from natlib.data import Absent
from natlib.macro import MacroConfig
from natlib.proxy import ProxyConfig
from natlib.records import Record
from natlib.report import RANKED, rank_correlation
from natlib.train import DataConfig
from natlib.transitions import by_name
from tests.made import DATA, resumed_equals_uninterrupted
from tests.tables import natbench_table, small_space

SMALL = small_space()


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> tabular.Space:
    monkeypatch.setattr(natbench, "load", natbench_table)
    return tabular.from_natbench()


def test_the_choice_is_the_closures_best() -> None:
    allowed = SMALL.allowed(by_name("natpp", SMALL.primitives))
    closures = SMALL.closures(allowed)
    found = proxy.choices(closures, SMALL.test)
    for code, choice in enumerate(found.tolist()):
        reached = SMALL.closure(allowed, code)
        assert choice in reached
        assert SMALL.test[choice] == SMALL.test[reached].max()
    # A judge that finds all alike changes what it can by the order of the codes alone.
    same = proxy.choices(closures, np.zeros(SMALL.size))
    assert all(same == [SMALL.closure(allowed, c).min() for c in range(SMALL.size)])
    # What is not scored is not chosen.
    some = np.where(np.arange(SMALL.size) % 2, np.nan, SMALL.test)
    for code, choice in enumerate(proxy.choices(closures, some).tolist()):
        even = [c for c in SMALL.closure(allowed, code) if not c % 2]
        assert choice == (max(even, key=lambda c: SMALL.test[c]) if even else code)
    assert all(proxy.choices(closures, np.full(SMALL.size, np.nan)) == np.arange(SMALL.size))


TINY = ProxyConfig(
    0, epochs=2, images=24, scored=5, batch=24, data=DATA,
    macro=MacroConfig(channels=4, cells=3, classes=4, image_size=8, stem=1),
)  # fmt: skip


def test_a_stopped_supernet_goes_on_as_if_never_stopped(made_images: None, tmp_path: Path) -> None:
    record = resumed_equals_uninterrupted(tmp_path, "proxy", TINY, proxy.score, (1, 3))
    found = record.result["accuracy"]
    assert len(found) == natbench.SIZE
    assert len(record.result["losses"]) == 2
    scored = [i for i, accuracy in enumerate(found) if accuracy is not None]
    assert len({natbench.trained_as(i) for i in scored}) == TINY.scored
    assert all(found[i] == found[natbench.trained_as(i)] for i in scored)
    assert all(found[i] * 24 == pytest.approx(round(found[i] * 24)) for i in scored)


def test_without_the_images_the_recorded_results_are_shown(
    made_images: None, space: tabular.Space, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NATLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(proxy, "DATA", DATA)
    asked = {name: getattr(TINY, name) for name in ("epochs", "images", "scored", "batch", "macro")}
    asked["data"] = DATA
    here, source = proxy.scores(asked, 2, 1, "smoke")
    assert source == "computed on this machine"
    assert [r.config["seed"] for r in here] == [0, 1]
    monkeypatch.setenv("NATLIB_RUNS", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(train, "splits", absent)
    assert proxy.scores(asked, 2, 1, "smoke") == ([], "nothing to show yet, because no images")
    monkeypatch.setattr(records, "read_reference", lambda scale, root: here)
    recalled, source = proxy.scores(asked, 2, 1, "smoke")
    assert [r.result for r in recalled] == [r.result for r in here]
    assert source == "our recorded results, because no images"


def absent(config: DataConfig) -> None:
    raise Absent("cifar10", "no images")


def record(values: np.ndarray) -> Record:
    return Record(
        "proxy", "k", 1, {}, "", {}, {"accuracy": values.tolist()}, {}, {}, Path("record.json")
    )


def test_judges_are_judged_on_networks_that_they_did_not_see(space: tabular.Space) -> None:
    entries = natbench_table().entries
    perfect, blind = record(space.test), record(-space.test)
    found = proxy.judges([perfect, blind], space, "natpp")
    assert [c.rho for c in found["supernet"].correlations] == pytest.approx([1, -1])
    best, worst = found["supernet"].gains
    assert best == max(max(j.gains) for j in found.values())
    assert worst < 0 < best
    closures = space.closures(space.allowed(by_name("natpp", space.primitives)))
    for seed, gain in enumerate(found["one training"].gains):
        by = np.array([e.validation[seed] for e in entries])
        test = np.array([e.test[1 - seed] for e in entries])
        expected = (test[proxy.choices(closures, by)] - test).mean()
        assert gain == pytest.approx(expected)
    n = len({e.trained_as for e in entries})
    assert {c.n for j in found.values() for c in j.correlations} == {n}


def test_the_table_says_how_many_seeds_a_judge_has(space: tabular.Space) -> None:
    found = proxy.table(proxy.judges([record(space.test)] * 2, space, "natpp"))
    assert found["judge"].tolist() == [
        "supernet", "one training", "both trainings", "params", "MAdds",
    ]  # fmt: skip
    rho, gain = found.columns[1:]
    assert [cell.endswith("(n = 2 seeds)") for cell in found[rho]] == [True] * 2 + [False] * 3
    n = len({e.trained_as for e in natbench_table().entries})
    assert [f"({n:,} architectures)" in cell for cell in found[rho]] == [False] * 2 + [True] * 3
    assert ["(n = 2)" in cell for cell in found[gain]] == [True] * 2 + [False] * 3


def test_rows_of_judges_are_those_with_seeds() -> None:
    found = proxy.Judge(
        tuple(rank_correlation([1, 2, 3, 4], order) for order in ([1, 2, 3, 4], [4, 3, 2, 1])),
        (0.01, 0.02),
    )
    alone = proxy.Judge(found.correlations[:1], (0.1,))
    rows = proxy.rows({"supernet": found, "params": alone})
    assert list(rows) == ["supernet"]
    assert rows["supernet"][RANKED] == [1, -1]
    (claim,) = claims.judge({"truth_natbench": rows})
    assert claim.evidence.n == 2 and "natbench" in claim.text  # type: ignore[union-attr]
