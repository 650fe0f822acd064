"""Claims judged on rows that pages found or recorded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from natlib import claims, evidence
from natlib.claims import BEFORE, CHANGE, MADDS
from natlib.report import format_interval, interval, scorecard
from natlib.train import LEARNED_ENOUGH

TABLE = {
    "A, original": {"top-1 (%)": [0.5, 0.6]},
    "A, NAT": {"top-1 (%)": [0.6, 0.8], MADDS: [-0.1, 0.0]},
    "A, NAO": {"top-1 (%)": [0.5, 0.5], MADDS: [0.1, -0.1]},
    "B, slots, original": {"top-1 (%)": [0.3, 0.3]},
    "B, slots, NAT": {"top-1 (%)": [0.2, 0.3], MADDS: [-0.1, 0.0]},
    "all networks, NAT": {"change (points)": [0.0, 0.1]},
}


def test_a_mixed_difference_is_over_the_networks_that_both_have() -> None:
    both = claims.mixed(TABLE, "NAT", "original")
    assert both is not None and (both.n, both.mean) == (2, pytest.approx(0.05))
    one = claims.mixed(TABLE, "NAT", "NAO")
    assert one is not None and one.mean == pytest.approx(0.2)
    assert claims.mixed(TABLE, "NAT++", "original") is None


def test_rows_of_gains_are_means_of_each_supernet() -> None:
    def gain(shift: float) -> Any:
        one = {"accuracy": [0.2, 0.4], "madds": [10, 30], "params": [1, 1]}
        other = {"accuracy": [0.2 + shift, 0.4], "madds": [10, 10], "params": [1, 1]}
        return SimpleNamespace(result={"input": one, "natpp": other, "natpp argmax": one})

    rows = claims.gain_rows([gain(0.2), gain(-0.2)])
    assert list(rows) == ["NAT++ sample", "NAT++ argmax"]
    assert rows["NAT++ sample"][CHANGE] == pytest.approx([0.1, -0.1])
    assert rows["NAT++ sample"][MADDS] == [-0.5, -0.5]
    assert rows["NAT++ argmax"][CHANGE] == [0, 0]


def test_rows_of_derived_cells() -> None:
    one = {"before_accuracy": 0.2, "accuracy": 0.25, "before_madds": 100, "madds": 80}
    rows = claims.derived_rows([SimpleNamespace(result={"VGG": {"nat": one}})])  # type: ignore[list-item]
    assert rows["VGG, NAT"][CHANGE] == pytest.approx([0.05])
    assert rows["VGG, NAT"][MADDS] == pytest.approx([-0.2])


def test_each_page_is_judged_by_its_own_claims_and_only_on_what_it_found() -> None:
    policy = {
        f"{rule} {how}": {CHANGE: (np.array([0.01, 0.02, 0.03]) * k).tolist(), MADDS: [-0.5] * 3}
        for k, (rule, how) in enumerate(
            (r, h) for r in ("NAT", "NAT++") for h in ("random", "sample", "argmax")
        )
    }
    cells = {
        "VGG, NAT": {BEFORE: [0.2, 0.2], CHANGE: [0.1, 0.1]},
        "DARTS, NAT": {BEFORE: [0.1, 0.2], CHANGE: [-0.1, -0.3]},
        "DARTS, NAT++": {BEFORE: [0.1, 0.2], CHANGE: [0.1, 0.2]},
        "ENAS, NAT": {BEFORE: [0.1, 0.19], CHANGE: [0.9, 0.9]},
    }
    learners = {
        "A, Sampling-GCN": {"top-1 (%)": [0.5, 0.6]},
        "A, LSTM": {"top-1 (%)": [0.6, 0.6]},
    }
    found = claims.judge(
        {
            "04_policy": policy,
            "05_transform": cells,
            "table_1_handcrafted": TABLE,
            "table_3_learners": learners,
            "table_4_graphs": TABLE,
        }
    )
    said = {(c.where, c.text): c.evidence for c in found}
    assert len(said) == len(found) == 6 + 2 + 2 + 1 + 1 + 1
    assert {where for where, _ in said} <= set(claims.JUDGES)
    saved = said["04_policy", "Learned NAT++ rewritings save MAdds (argmax; percent)"]
    assert saved is not None and saved.mean == 0.5  # type: ignore[union-attr]
    # Shared weights hardly tell ENAS from guessing: it does not count.
    nat = next(c for c in found if c.where == "05_transform" and c.text.startswith("NAT improves"))
    assert "(VGG, DARTS)" in nat.text
    assert nat.evidence.mean == pytest.approx(-0.05)  # type: ignore[union-attr]
    (lstm,) = (c for c in found if c.where == "table_3_learners")
    assert "LSTM (A)" in lstm.text and lstm.evidence.mean == pytest.approx(-0.05)  # type: ignore[union-attr]
    graphs = next(c for c in found if c.where == "table_4_graphs")
    assert "(A, B)" in graphs.text


def test_networks_that_learned_nothing_decide_nothing_but_costs() -> None:
    unlearned = {name: dict(columns) for name, columns in TABLE.items()}
    unlearned["A, original"][LEARNED_ENOUGH] = [0.0, 0.0]
    unlearned["A, NAT"][evidence.DROPPED] = [3.0, 4.0]
    found = claims.judge({"table_1_handcrafted": unlearned})
    *accuracy, nat, nao = found
    more = dict(unlearned["A, NAT"]) | {evidence.DROPPED: [0.0, 0.0]}
    *_, none, _ = claims.judge({"table_1_handcrafted": unlearned | {"A, NAT": more}})
    assert scorecard(accuracy).verdict.tolist() == ["cannot be decided at this scale"] * 2
    assert accuracy[0].words.startswith("the originals learned too little: +5.0 [")
    assert np.isnan([c.p for c in accuracy]).all()
    assert not np.isnan(claims.judge({"table_1_handcrafted": TABLE})[1].p)
    assert (nat.verdict(1), nat.measured) == (
        "does not hold", "7 samples did, and were dropped, in 2 rewritings",
    )  # fmt: skip
    assert none.verdict(1) == "holds"
    # A mean change of nothing, of which half cost more.
    assert nao.words == "1 of 2 cost more MAdds, on average +0.0 [-127.1, 127.1] (n = 2)"
    assert nao.verdict(nao.p) == "cannot be decided at this scale"
    assert claims.judge({}) == []


def test_released_cells_are_a_method_of_their_own() -> None:
    rows = {
        "DARTS, original": {"top-1 (%)": [0.5, 0.6]},
        "DARTS, NAT, released": {"top-1 (%)": [0.6, 0.8]},
    }
    assert claims.by_method(rows)["NAT, released"].keys() == {"DARTS"}
    (claim,) = claims.judge({"table_2_nas": rows})
    assert claim.text == "The authors' NAT cells beat their originals (DARTS), trained from scratch"
    assert claim.evidence.mean == pytest.approx(0.15)  # type: ignore[union-attr]


def test_whether_the_graph_matters_is_decided_by_a_point() -> None:
    def verdict(gains: list[float], spread: float) -> str:
        rows: dict[str, dict[str, list[float]]] = {}
        for graph, gain in zip(("published", "nearest", "slots"), gains, strict=True):
            rows[f"VGG16, {graph}, original"] = {"top-1 (%)": [0.5, 0.5, 0.5]}
            found = [0.5 + gain, 0.5 + gain + spread, 0.5 + gain - spread]
            shown = found if graph == "slots" else [found[0]] * 3
            rows[f"VGG16, {graph}, NAT"] = {"top-1 (%)": shown, MADDS: [0.0] * 3}
        claim = claims.judge({"table_4_graphs": rows})[-1]
        assert "slots − published" in claim.measured
        return claim.verdict(1)

    assert verdict([0.02, 0.021, 0.02], 0.001) == "holds"
    assert verdict([0.02, 0.02, 0.05], 0.001) == "does not hold"
    assert verdict([0.02, 0.02, 0.02], 0.02) == "cannot be decided at this scale"


def test_shared_weights_that_rank_are_judged_over_architectures() -> None:
    def records(*values: list[float]) -> Any:
        return [SimpleNamespace(result={"accuracy": v, "report_accuracy": v[0]}) for v in values]

    scored = records([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.4, 0.3])
    trained = [records([v], [v + 0.1]) for v in (0.5, 0.6, 0.7, 0.8)]
    rows = claims.rank_rows(scored, trained)
    assert rows["shared weights"][claims.RANKS] == pytest.approx([1, -1, 0.8])
    assert rows["from scratch"]["accuracy (%)"] == pytest.approx([0.65, 0.75])
    (claim,) = claims.judge({"03_supernet": rows})
    # Over architectures, which are four: not over supernets, which rank the same ones.
    assert claim.words.startswith("Spearman's ρ +0.80 [") and "(n = 4)" in claim.words
    assert claim.p == pytest.approx(0.339, abs=1e-3)


def test_the_readme_shows_what_the_long_runs_say() -> None:
    card = scorecard(claims.judge({page: evidence.rows(page) for page in claims.JUDGES}))
    lines = ["| claim | found | verdict |", "|---|---|---|"]
    for row in card.itertuples():
        lines.append(f"| {row.claim} | {row[3]} | {row.verdict} |".replace("\u00a0", " "))
    expected = "\n".join(lines)
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert expected in readme, f"README.md should show\n{expected}"


README = (Path(__file__).parent.parent / "README.md").read_text().replace("\u2212", "-")


def test_the_readme_counts_the_claims_of_the_long_runs() -> None:
    card = scorecard(claims.judge({page: evidence.rows(page) for page in claims.JUDGES}))
    hold, fail, open_ = (
        int((card.verdict == v).sum())
        for v in ("holds", "does not hold", "cannot be decided at this scale")
    )
    said = (
        f"Of {len(card)} claims at the `extended` scale {hold} hold, {fail} do not and {open_} "
        "cannot be decided."
    )
    assert said in " ".join(README.split()), said


@pytest.mark.parametrize("scale", ["reduced", "extended"])
def test_the_readme_shows_the_gains_by_shared_weights(scale: str) -> None:
    titles = {"argmax": "learned, argmax", "sample": "learned, one sample"}
    for name, columns in evidence.rows("04_policy", scale).items():
        rule, how = name.split()
        line = next(
            found
            for found in README.splitlines()
            if found.startswith(f"| {rule}, {titles.get(how, 'uniform random')} |")
        )
        gain = format_interval(interval(columns[CHANGE]), counted=False)
        saved = f"{100 * np.mean(columns[MADDS]):.0f} %"
        assert f"| {gain} | {saved} |" in line, (name, gain, saved)


def test_the_readme_shows_what_training_from_scratch_says() -> None:
    for page, network in (
        ("table_2_nas", "DARTS"),
        ("table_1_handcrafted", "ResNet20"),
        ("table_5_random_architectures", "R1"),
    ):
        rows = evidence.rows(page)
        line = next(found for found in README.splitlines() if found.startswith(f"| {network}, "))
        original = interval(rows[f"{network}, original"]["top-1 (%)"])
        half = 100 * (original.high - original.mean)
        cells = [f"{100 * original.mean:.1f} ± {half:.1f}"]
        for method in ("NAO", "NAT", "NAT++"):
            if row := rows.get(f"{network}, {method}"):
                change = format_interval(interval(row["change (points)"]), counted=False)
            cells.append(change if row else "–")
        assert line.endswith(f"| {' | '.join(cells)} |"), cells
