"""Claims judged on rows that pages found or recorded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from natlib import claims
from natlib.claims import CHANGE, MADDS
from natlib.report import scorecard

TABLE = {
    "A, original": {"top-1 (%)": [0.5, 0.6]},
    "A, NAT": {"top-1 (%)": [0.6, 0.8]},
    "A, NAO": {"top-1 (%)": [0.5, 0.5]},
    "B, slots, original": {"top-1 (%)": [0.3, 0.3]},
    "B, slots, NAT": {"top-1 (%)": [0.2, 0.3]},
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
        "VGG, NAT": {CHANGE: [0.1, 0.1]},
        "DARTS, NAT": {CHANGE: [-0.1, -0.3]},
        "DARTS, NAT++": {CHANGE: [0.1, 0.2]},
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
    assert len(said) == len(found) == 6 + 2 + 2 + 1 + 1
    assert {where for where, _ in said} <= set(claims.JUDGES)
    saved = said["04_policy", "Learned NAT++ rewritings save MAdds (argmax; percent)"]
    assert saved is not None and saved.mean == 0.5  # type: ignore[union-attr]
    nat = next(c for c in found if c.where == "05_transform" and c.text.startswith("NAT improves"))
    assert nat.evidence.mean == pytest.approx(-0.05)  # type: ignore[union-attr]
    (lstm,) = (c for c in found if c.where == "table_3_learners")
    assert "LSTM (A)" in lstm.text and lstm.evidence.mean == pytest.approx(-0.05)  # type: ignore[union-attr]
    graphs = next(c for c in found if c.where == "table_4_graphs")
    assert "(A, B)" in graphs.text


def test_networks_that_learned_nothing_decide_nothing() -> None:
    found = claims.judge({"table_1_handcrafted": TABLE}, ["table_1_handcrafted"])
    assert [c.evidence for c in found] == [None, None]
    assert set(scorecard(found).verdict) == {"cannot be decided at this scale"}
    assert "learned too little" in found[0].words
    assert claims.judge({}) == []
