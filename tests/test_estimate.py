"""What a scale costs before it runs: networks counted, work, and the dry run itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from natlib import NatlibError, estimate, handcrafted, zoo
from natlib.cost import network_cost
from natlib.macro import MacroConfig
from natlib.primitives import PRIMITIVES
from natlib.records import REPOSITORY
from natlib.search import PolicyConfig, ScoreConfig, SpaceConfig, SupernetConfig
from natlib.train import DataConfig, TrainConfig

IMAGES = DataConfig("cifar10", 32, 20_000, 20_000, 10_000, 10_000)
SUPERNET = SupernetConfig(IMAGES, MacroConfig(20, 8), SpaceConfig(), 0, 200, snapshots=10)
TRAINING = TrainConfig(IMAGES, MacroConfig(36, 20), zoo.get("DARTS"), 0, 600, auxiliary=0.4)


def test_the_formula_gives_the_published_supernet() -> None:
    assert estimate.supernet_parameters(MacroConfig(20, 8), 4, PRIMITIVES) == 15_024_550


def test_a_network_that_is_not_what_the_formula_says_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "supernet_parameters", lambda *_: 7)
    monkeypatch.setattr(estimate, "_supernet", estimate._supernet.__wrapped__)
    with pytest.raises(NatlibError, match="15024550 parameters when built, 7 by"):
        estimate.estimate("supernet", SUPERNET)


def test_training_costs_three_passes_an_image_and_an_epoch() -> None:
    one = estimate.estimate("train", TRAINING)
    two = estimate.estimate("train", replace(TRAINING, epochs=1200))
    assert (two.madds - one.madds) / (3 * 600 * 20_000) == pytest.approx(
        network_cost(zoo.get("DARTS"), MacroConfig(36, 20)).madds, rel=0.02
    )
    # With 50,000 images it would be the day that the rate comes from.
    assert one.hours * 50_000 / 20_000 == pytest.approx(24, rel=0.03)
    assert one.trainings == 1
    assert 4e9 < one.memory < 11e9, "it fitted into 11 GB of a 1080 Ti"


def test_a_network_with_printed_parameters_is_recognised() -> None:
    macro = handcrafted.macro("ResNet20", "CIFAR-10")
    config = replace(TRAINING, macro=macro, genotype=handcrafted.ORIGINALS["ResNet20"], auxiliary=0)
    assert len(estimate.estimate("train", config).published) == 1


def test_policies_and_scores_cost_forward_passes_of_the_supernet() -> None:
    config = PolicyConfig(SUPERNET, "k", "natpp", 0, 100)
    policy = estimate.estimate("policy", config)
    assert len(policy.networks) == 2
    assert policy.trainings == 1
    scored = estimate.estimate("score", ScoreConfig(SUPERNET, "k", (zoo.get("DARTS"),) * 3))
    assert scored.trainings == 0
    assert scored.madds / 30_000 == pytest.approx(policy.madds / (100 * 2 * 64))
    assert len((policy + scored).networks) == 2


def test_what_says_nothing_is_not_guessed() -> None:
    @dataclass(frozen=True)
    class Other:
        number: int = 1

    assert estimate.estimate("other", Other()).unknown == ("other",)


@pytest.mark.parametrize("scale", ["smoke", "paper"])
def test_the_dry_run_estimates_every_notebook_without_data(scale: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NATLIB")}
    command = [sys.executable, "scripts/dry_run.py", "--scale", scale, "--json"]
    done = subprocess.run(
        [*command, str(tmp_path / "estimate.json")],
        cwd=REPOSITORY,
        env={**environment, "NATLIB_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "estimate.json").read_text())
    rows = {row[0]: row[1:] for row in content["rows"]}
    experiments = yaml.safe_load((REPOSITORY / "experiments.yml").read_text())
    assert list(rows) == [*(n for n, e in experiments.items() if scale in e["parameters"]), "all"]
    given = experiments["03_supernet"]["parameters"][scale]
    ranked = given["ranked"]
    trainings = len(given["seeds"]) + ranked * len(given["ranking_seeds"])
    assert rows["03_supernet"][:2] == [str(ranked + 1), str(trainings)]
    assert "GPU-hours" in done.stdout
    assert not list(tmp_path.glob("runs*"))


def test_another_value_of_dry_run_is_refused() -> None:
    done = subprocess.run(
        ["make", "reproduce", "DRY_RUN=yes"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "DRY_RUN=yes must be 0 or 1" in done.stderr
