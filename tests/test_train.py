from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from natlib import NatlibError, data, train
from natlib.cost import network_cost
from natlib.genotype import Genotype
from natlib.macro import ACTIVATION, BLOCKS, BlockMacro, MacroConfig, Stage, conv
from natlib.network import CellNetwork
from natlib.records import as_json
from natlib.train import (
    CapturedStep,
    DataConfig,
    Part,
    TrainConfig,
    accuracy,
    augmented,
    cosine,
    device,
    macro_for,
    sgd,
    sgd_step,
    splits,
    stream,
    train_standalone,
)
from natlib.zoo import ZOO
from tests import made
from tests.made import DATA, resumed_equals_uninterrupted, run, same
from tests.strategies import chain, generator

pytestmark = pytest.mark.usefixtures("made_images")

MACRO = MacroConfig(channels=4, cells=3, classes=4, image_size=8)
SMALL = Genotype(
    chain("sep_conv_3x3", "skip_connect", "max_pool_3x3"),
    chain("conv_1x1", "skip_connect", "avg_pool_3x3"),
)
CONFIG = TrainConfig(DATA, MACRO, SMALL, seed=0, epochs=3, batch=16)


# --- randomness ----------------------------------------------------------------------------------


def test_each_seed_looks_at_images_of_its_own_while_there_are_enough() -> None:
    n = 5
    labels = torch.arange(12)
    part = Part(labels[:, None], labels, labels[:, None] / 2)
    shares = [part.share(n, seed).labels.tolist() for seed in range(3)]
    assert shares == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 0, 1, 2]]
    own = part.share(n, 1)
    assert own.raw[:, 0].tolist() == own.labels.tolist() == (own.normalised[:, 0] * 2).tolist()
    for images in (0, 13):
        with pytest.raises(NatlibError, match=rf"images = {images}; this part has 12"):
            part.share(images, 0)


def test_streams_depend_on_seed_and_labels_only() -> None:
    def draw(*labels: str | int, seed: int = 0) -> list[float]:
        return torch.rand(4, generator=stream(seed, *labels)).tolist()

    assert draw("epoch", 1) == draw("epoch", 1)
    others = [draw("epoch", 2), draw("epoch"), draw("batch", 1), draw("epoch", 1, seed=1), draw()]
    assert len({tuple(d) for d in [draw("epoch", 1), *others]}) == 6


def test_training_touches_no_global_random_state(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    run(tmp_path, "train", CONFIG, train_standalone)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- splits --------------------------------------------------------------------------------------


def pixels(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.cpu()}


def test_parts_are_disjoint_of_the_sizes_asked_for_and_never_test_images() -> None:
    parts = splits(DATA)
    named = {"train": 48, "search": 40, "report": 36, "test": 32}
    seen = {name: pixels(getattr(parts, name).raw) for name in named}
    assert {name: len(s) for name, s in seen.items()} == named
    for name, size in named.items():
        part = getattr(parts, name)
        assert len(part.labels) == len(part.normalised) == size
        assert torch.bincount(part.labels, minlength=4).tolist() == [size // 4] * 4
    assert len(set().union(*seen.values())) == sum(named.values())
    test_images = pixels(made.load("made", "test").images)
    for name in named:
        assert bool(seen[name] & test_images) == (name == "test")
    assert (parts.classes, parts.channels, parts.source) == (4, 3, "made for tests")


def test_all_parts_are_normalised_with_the_training_parts_statistics() -> None:
    parts = splits(DATA)
    levels = parts.train.raw.cpu().double() / 255
    mean, std = levels.mean((0, 2, 3)), levels.std((0, 2, 3), correction=0)
    torch.testing.assert_close(parts.mean.double(), mean, rtol=1e-5, atol=1e-6)
    for part in (parts.train, parts.search, parts.report, parts.test):
        expected = (part.raw.cpu() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        torch.testing.assert_close(part.normalised.cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_the_split_follows_its_seed_and_the_checksum_what_is_in_it() -> None:
    first = splits(DATA)
    splits.cache_clear()
    again = splits(DATA)
    assert torch.equal(first.train.raw, again.train.raw)
    other = splits(replace(DATA, seed=1))
    assert pixels(first.train.raw) != pixels(other.train.raw)
    fewer = splits(replace(DATA, test=16))
    assert first.checksum == again.checksum
    assert len({first.checksum, other.checksum, fewer.checksum}) == 3


def test_images_may_be_smaller() -> None:
    parts = splits(replace(DATA, image_size=4))
    assert parts.train.raw.shape == (48, 3, 4, 4)
    # Cut, then made smaller; the other way round it would be the same.
    smaller = made.load("made", "train").resized(4)
    sizes = {"train": 48, "search": 40, "report": 36}
    for name, images in data.partition(smaller, sizes, DATA.seed).items():
        assert torch.equal(getattr(parts, name).raw.cpu(), images.images)
    assert macro_for(replace(DATA, image_size=4), 6, 5) == MacroConfig(6, 5, 4, 4, 3)


def test_sizes_that_the_data_set_has_not() -> None:
    with pytest.raises(NatlibError, match="at most 160"):
        splits(replace(DATA, train=100))
    with pytest.raises(NatlibError, match="at most 40"):
        splits(replace(DATA, test=41))
    with pytest.raises(NatlibError, match="auto"):
        DataConfig("auto", 8, 1, 1, 1, 1)


# --- what regularises training ------------------------------------------------------------------

REGULARISED = replace(
    CONFIG, macro=replace(MACRO, image_size=32), data=replace(DATA, image_size=32), epochs=2,
    drop_path=0.4, auxiliary=0.4, smoothing=0.1,
)  # fmt: skip


def test_added_settings_leave_old_keys_as_they_were() -> None:
    assert not {"drop_path", "auxiliary", "smoothing"} & set(as_json(CONFIG))
    added = as_json(replace(CONFIG, drop_path=0.2))
    assert {k: v for k, v in added.items() if k != "drop_path"} == as_json(CONFIG)
    assert added["drop_path"] == 0.2


@pytest.fixture
def larger_images(made_images: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The made images at 32 x 32, for an auxiliary head needs some size."""

    def load(name: str, split: str) -> data.ImageSet:
        small = made.load(name, split)
        large = small.images.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return replace(small, images=large, checksum="")

    monkeypatch.setattr(data, "load", load)


@pytest.mark.usefixtures("larger_images")
def test_regularised_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    record = resumed_equals_uninterrupted(tmp_path, "train", REGULARISED, train_standalone, (4,))
    plain = replace(REGULARISED, drop_path=0.0, auxiliary=0.0, smoothing=0.0)
    weaker = replace(REGULARISED, smoothing=0.0)
    others = [run(tmp_path / "others", "train", c, train_standalone) for c in (plain, weaker)]
    # Both of the added losses are positive, so the sum is above cross entropy alone.
    assert record.result["losses"][0] > others[0].result["losses"][0]
    assert record.result["losses"] != others[1].result["losses"]
    assert record.result["params"] == others[0].result["params"]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_hand_crafted_network_trains_and_resumes_too(tmp_path: Path, block: str) -> None:
    stages = (Stage(8, 2), Stage(16, 1, 2))
    macro = BlockMacro(block, stages, (conv(8, 3), ACTIVATION), classes=4, image_size=8)
    config = replace(CONFIG, macro=macro, genotype=ZOO["NAT_MobileNetv2"], lr=0.1, drop_path=0.2)
    record = resumed_equals_uninterrupted(tmp_path, "train", config, train_standalone, (4,))
    assert record.result["losses"][-1] < record.result["losses"][0]
    assert record.result["params"] == network_cost(config.genotype, macro).params


def test_paths_are_dropped_more_and_more_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = CellNetwork.forward

    def watched(self: CellNetwork, *inputs: Any, **options: Any) -> Tensor:
        if self.training:
            seen.append(self.drop_path)
        return forward(self, *inputs, **options)

    monkeypatch.setattr(CellNetwork, "forward", watched)
    run(tmp_path, "train", replace(CONFIG, epochs=4, drop_path=0.4), train_standalone)
    assert list(dict.fromkeys(seen)) == [0.0, 0.1, 0.2, pytest.approx(0.3)]


@pytest.mark.parametrize(
    ("name", "bad"), [("drop_path", 1.0), ("drop_path", -0.1), ("smoothing", 1), ("auxiliary", -1)]
)
def test_settings_that_cannot_be_are_named(name: str, bad: float) -> None:
    with pytest.raises(NatlibError, match=f"{name} = {bad}"):
        replace(CONFIG, **{name: bad})  # type: ignore[arg-type]


# --- accuracy ------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A network whose logits are its images, flattened; remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = True
        self.sizes: list[int] = []
        self.gradients: list[bool] = []

    def forward(self, images: Tensor, genotype: object = None, memo: object = None) -> Tensor:
        self.sizes.append(len(images))
        self.gradients.append(torch.is_grad_enabled())
        return images.flatten(1)


def test_accuracy_is_the_share_classified_right() -> None:
    network = Fixed()
    answers = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    images = nn.functional.one_hot(answers, 4).float().view(7, 4, 1, 1)
    labels = torch.tensor([0, 1, 2, 0, 0, 0, 0])
    assert accuracy(network, images, labels, batch=3) == 4 / 7  # type: ignore[arg-type]
    assert network.sizes == [3, 3, 1]
    assert not any(network.gradients)
    assert accuracy(network, images, answers) == 1.0  # type: ignore[arg-type]
    assert accuracy(network, images, (answers + 1) % 4) == 0.0  # type: ignore[arg-type]


def test_accuracy_of_a_network_counts_its_own_answers() -> None:
    parts = splits(DATA)
    network = CellNetwork(MACRO, genotype=SMALL, generator=generator()).eval().to(device())
    x, labels = parts.report.normalised, parts.report.labels
    with torch.no_grad():
        right = [int(network(x[i : i + 1]).argmax() == labels[i]) for i in range(len(x))]
    for batch in (1, 7, 36, 100):
        assert accuracy(network, x, labels, batch=batch) == sum(right) / 36
    assert 0 < sum(right) < 36


def test_judging_a_network_in_training_mode_leaves_it_as_it_is() -> None:
    parts = splits(DATA)
    network = CellNetwork(MACRO, genotype=SMALL, generator=generator()).to(device())
    x, labels = parts.report.normalised, parts.report.labels
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = accuracy(network, x, labels)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert found == accuracy(network.eval(), x, labels) and not network.training


def test_accuracy_over_nothing() -> None:
    with pytest.raises(NatlibError, match="no images"):
        accuracy(CellNetwork(MACRO, genotype=SMALL), torch.empty(0, 3, 8, 8), torch.empty(0))


# --- pieces of training --------------------------------------------------------------------------


def test_cosine() -> None:
    assert cosine(0, 10, 0.5, 0.1) == 0.5
    assert math.isclose(cosine(5, 10, 0.5, 0.1), 0.3)
    assert math.isclose(cosine(10, 10, 0.5, 0.1), 0.1)
    rates = [cosine(i, 10, 0.5, 0.1) for i in range(11)]
    assert rates == sorted(rates, reverse=True)
    assert cosine(3, 10, 0.2, 0.2) == 0.2


def test_augmented_batches_are_shifted_mirrored_normalised_images() -> None:
    parts = splits(DATA)
    x = augmented(parts.train.raw, parts.mean, parts.std, generator())
    assert x.shape == (48, 3, 8, 8)
    assert torch.equal(x, augmented(parts.train.raw, parts.mean, parts.std, generator()))
    assert not torch.equal(x, augmented(parts.train.raw, parts.mean, parts.std, generator(1)))
    # Every image is one of the 18 shifts of at most one pixel and mirrorings of its original.
    padded = nn.functional.pad(parts.train.raw, (1, 1, 1, 1))
    options = [
        view
        for top in range(3)
        for left in range(3)
        for crop in [padded[:, :, top : top + 8, left : left + 8]]
        for view in (crop, crop.flip(3))
    ]
    whole = torch.stack([data.normalise(o, parts.mean, parts.std) for o in options])
    found = (whole - x).abs().amax((2, 3, 4)) < 1e-5
    assert bool(found.any(0).all())
    assert len(set(found.int().argmax(0).tolist())) > 9


def test_cutout_sets_a_square_to_the_mean() -> None:
    parts = splits(DATA)
    x = augmented(parts.train.raw, parts.mean, parts.std, generator(), cutout=4)
    zeros = (x == 0).all(1).sum((1, 2))
    assert bool((zeros >= 4).all())
    assert int(zeros.max()) == 16
    whole = augmented(parts.train.raw, parts.mean, parts.std, generator())
    assert bool((whole != 0).any(1).all())


def test_a_step_is_clipped_gradient_descent_with_momentum_and_decay() -> None:
    network = nn.Linear(3, 1, bias=False)
    unused = nn.Parameter(torch.ones(2))
    network.register_parameter("unused", unused)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    optimizer = sgd(network, momentum=0.9, weight_decay=0.1)  # type: ignore[arg-type]
    weight, velocity = network.weight.detach().clone(), torch.zeros(1, 3)
    for lr in (0.5, 0.25):
        loss = (network.weight * torch.tensor([[30.0, 40.0, 0.0]])).sum()
        sgd_step(optimizer, loss, lr, clip=5.0)
        gradient = torch.tensor([[3.0, 4.0, 0.0]]) + 0.1 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - lr * velocity
        torch.testing.assert_close(network.weight.detach(), weight, rtol=1e-5, atol=1e-6)
    # A weight that a step does not use is left alone, by decay as well.
    assert torch.equal(unused.detach(), torch.ones(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, genotype=ZOO["R1"], cutout=2, smoothing=0.1),
        replace(CONFIG, macro=BlockMacro("basic", (Stage(8, 1),), (conv(8, 3), ACTIVATION),
                classes=4, image_size=8), genotype=ZOO["ResBlock"]),
    ],
)  # fmt: skip
def test_a_captured_step_gives_the_same_bits_as_one_launch_a_kernel(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = run(tmp_path / "captured", "train", config, train_standalone)
    assert len(splits(DATA).train.labels) // config.batch * config.epochs > CapturedStep.WARM + 1
    monkeypatch.setattr(CapturedStep, "WARM", 10**9)
    plain = run(tmp_path / "plain", "train", config, train_standalone)
    assert captured.result == plain.result
    assert same(captured.load("weights"), plain.load("weights"))


def test_steps_are_captured_only_where_each_does_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What would be captured on an accelerator, on whatever device this is.
    given = []
    epochs = train.train_epochs

    def watched(*inputs: Any, fixed: bool = False, **options: Any) -> list[float]:
        given.append(fixed)
        return epochs(*inputs, **options)

    monkeypatch.setattr(train, "train_epochs", watched)
    for number, drop_path in enumerate((0.0, 0.4)):
        config = replace(CONFIG, epochs=1, drop_path=drop_path)
        run(tmp_path / str(number), "train", config, train_standalone)
    assert given == [True, False]


def test_device_is_the_cpu_where_there_is_no_other() -> None:
    assert device().type == ("cuda" if torch.cuda.is_available() else "cpu")


# --- from scratch --------------------------------------------------------------------------------


def test_training_learns_and_records_what_it_did(tmp_path: Path) -> None:
    record = run(tmp_path, "train", replace(CONFIG, epochs=12, lr=0.1), train_standalone)
    result = record.result
    assert len(result["losses"]) == 12
    assert result["losses"][0] > math.log(4) * 0.7
    assert result["losses"][-1] < 0.5 * result["losses"][0]
    assert result["report_accuracy"] > 0.6
    assert result["test_accuracy"] > 0.6
    cost = network_cost(SMALL, MACRO)
    assert (result["params"], result["madds"]) == (cost.params, cost.madds)
    # The saved weights are the network that was measured.
    network = CellNetwork(MACRO, genotype=SMALL).to(device())
    network.load_state_dict(record.load("weights"))
    network.eval()
    for name in ("report", "test"):
        part = getattr(splits(DATA), name)
        assert accuracy(network, part.normalised, part.labels) == result[f"{name}_accuracy"]


@pytest.mark.parametrize("genotype", [SMALL, ZOO["R1"]])
def test_stopped_and_resumed_equals_uninterrupted(genotype: Genotype, tmp_path: Path) -> None:
    # Three steps an epoch: stopped in the first (nothing saved yet), the second, the third epoch.
    config = replace(CONFIG, genotype=genotype, cutout=2)
    resumed_equals_uninterrupted(tmp_path, "train", config, train_standalone, (2, 5, 4))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path) -> None:
    one, two, other = (
        run(tmp_path / name, "train", replace(CONFIG, seed=seed, epochs=1), train_standalone)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.result == two.result
    assert same(one.load("weights"), two.load("weights"))
    assert not same(one.load("weights"), other.load("weights"))


def test_validation_and_test_images_do_not_reach_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, epochs=6, lr=0.1)
    one = run(tmp_path / "a", "train", config, train_standalone)
    clean = splits(DATA)
    spoilt = {
        name: replace(part, raw=255 - part.raw, normalised=-part.normalised, labels=3 - part.labels)
        for name in ("search", "report", "test")
        for part in [getattr(clean, name)]
    }
    monkeypatch.setattr("natlib.train.splits", lambda config: replace(clean, **spoilt))
    two = run(tmp_path / "b", "train", config, train_standalone)
    assert same(one.load("weights"), two.load("weights"))
    assert one.result["losses"] == two.result["losses"]
    assert one.result["test_accuracy"] != two.result["test_accuracy"]


def test_divergence_is_said_and_leaves_no_record(tmp_path: Path) -> None:
    with pytest.raises(NatlibError, match=r"diverged in epoch 1.*lower lr than 1e\+30"):
        run(tmp_path, "train", replace(CONFIG, lr=1e30), train_standalone)
    assert not list(tmp_path.glob("*/*/record.json"))


def test_a_batch_larger_than_the_images(tmp_path: Path) -> None:
    with pytest.raises(NatlibError, match=r"batch_size 64.*1 to 48"):
        run(tmp_path, "train", replace(CONFIG, batch=64), train_standalone)
