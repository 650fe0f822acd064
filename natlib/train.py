"""Data splits for experiments, accuracy, and training a standalone network from scratch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from natlib import data
from natlib.cost import network_cost
from natlib.errors import NatlibError
from natlib.genotype import Genotype
from natlib.macro import Macro, MacroConfig
from natlib.network import CellNetwork, Memo
from natlib.records import ADDED_LATER, Run

# Batches of 64 to 128 are fastest on CPUs, those of 512 half as fast; 125 divides all parts' sizes.
EVALUATION_BATCH = 125
LEARNED = 0.3
"""See ``learned_enough``."""
LEARNED_ENOUGH = "learned"
"""Column of what pages keep of originals: 1 where these ``learned_enough``."""


@cache
def device() -> torch.device:
    """The accelerator where there is one, else the CPU.

    From the first call on this process uses the accelerator's deterministic convolutions only, so
    that a training repeated is the same training.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda")


def stream(seed: int, *labels: str | int) -> torch.Generator:
    """Return a generator of its own for one purpose, e.g. ``stream(0, "augment", epoch)``.

    Each (seed, labels) has an independent stream, so a resumed run draws what an uninterrupted
    one would, without saving generator states.
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *labels))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class DataConfig:
    """Which images an experiment sees, as disjoint parts of a data set's training split.

    ``train`` images train weights; ``search`` images give rewards and select candidates;
    ``report`` images measure what was selected (still validation data); ``test`` images of the
    test split are for networks trained from scratch only. ``seed`` fixes the split. ``dataset``
    must be a concrete name, not "auto".
    """

    dataset: str
    image_size: int
    train: int
    search: int
    report: int
    test: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset == "auto":
            raise NatlibError(
                "dataset 'auto' must be resolved first: natlib.data.load('auto').name"
            )


@dataclass(frozen=True)
class Part:
    """One part of the data: ``raw`` uint8 images, and all of it ``normalised``, with labels."""

    raw: Tensor
    labels: Tensor
    normalised: Tensor

    def share(self, images: int, seed: int) -> Part:
        """The ``images`` that a seed looks at: others for each seed, while there are enough.

        So an interval over seeds holds the luck of the images too. Raises NatlibError on more
        images than there are.
        """
        if not 0 < images <= len(self.labels):
            raise NatlibError(f"images = {images}; this part has {len(self.labels)}")
        own = torch.arange(seed * images, (seed + 1) * images, device=self.labels.device)
        own %= len(self.labels)
        return Part(self.raw[own], self.labels[own], self.normalised[own])


@dataclass(frozen=True)
class Splits:
    """The parts of a ``DataConfig`` on the compute device, with what normalised them."""

    train: Part
    search: Part
    report: Part
    test: Part
    classes: int
    channels: int
    mean: Tensor
    std: Tensor
    checksum: str
    source: str


@lru_cache(maxsize=2)
def splits(config: DataConfig) -> Splits:
    """Load, downsample and split the images; cached, since every step of a notebook needs them.

    Raises NatlibError if the data set cannot be had or is too small for the sizes asked for.
    """
    whole = data.load(config.dataset, "train")
    sizes = {"train": config.train, "search": config.search, "report": config.report}
    parts = data.partition(whole, sizes, config.seed)
    test = data.load(config.dataset, "test")
    parts |= data.partition(test, {"test": config.test}, config.seed)
    # Cut first: every process does this, and parts are often a fraction of what there is.
    parts = {name: images.resized(config.image_size) for name, images in parts.items()}
    mean, std = data.statistics(parts["train"])
    where = device()

    def part(images: data.ImageSet) -> Part:
        normalised = data.normalise(images.images, mean, std)
        return Part(images.images.to(where), images.labels.to(where), normalised.to(where))

    digest = hashlib.sha256("".join(parts[p].checksum for p in sorted(parts)).encode())
    return Splits(
        **{name: part(images) for name, images in parts.items()},
        classes=len(whole.classes),
        channels=whole.images.shape[1],
        mean=mean,
        std=std,
        checksum=digest.hexdigest(),
        source=whole.source,
    )


def lacking(config: DataConfig) -> str:
    """Say in a few words why the images of ``config`` cannot be had; "" where they can."""
    try:
        splits(config)
    except data.Absent as absent:
        return absent.why
    return ""


def learned_enough(accuracy: float, chance: float) -> bool:
    """Whether an original went three tenths of the way from ``chance``, that of guessing, to 1.

    Below that networks from scratch say nothing of one another.
    """
    return accuracy >= chance + LEARNED * (1 - chance)


def macro_for(config: DataConfig, channels: int, cells: int) -> MacroConfig:
    """The DARTS-style macro architecture that fits the images of ``config``."""
    parts = splits(config)
    return MacroConfig(channels, cells, parts.classes, config.image_size, parts.channels)


@torch.no_grad()
def accuracies(
    network: CellNetwork,
    images: Tensor,
    labels: Tensor,
    genotypes: Sequence[Genotype | None],
    batch: int = EVALUATION_BATCH,
) -> list[float]:
    """Share of images classified right, from 0 to 1, by each genotype on a supernet's weights.

    ``images`` normalised (N, C, H, W), ``labels`` (N,), in batches of ``batch`` in the given order.
    A supernet normalises with each batch's own statistics, so its accuracy depends on the order and
    the batch size: both are fixed. What genotypes have in common is computed once a batch (see
    ``network.Memo``); the result is that of each by itself. None stands for a standalone network's
    own genotype, which is judged in evaluation mode. Raises NatlibError without images.
    """
    if len(images) == 0:
        raise NatlibError("accuracy over no images is undefined")
    right = [0] * len(genotypes)
    training = network.training
    if not network.shared:
        network.eval()  # in training mode it would learn the statistics of what it is judged on
    try:
        for start in range(0, len(labels), batch):
            x, y = images[start : start + batch], labels[start : start + batch]
            memo = Memo() if len(genotypes) > 1 else None
            for i, genotype in enumerate(genotypes):
                right[i] += int((network(x, genotype, memo).argmax(1) == y).sum())
    finally:
        network.train(training)
    return [count / len(labels) for count in right]


def accuracy(
    network: CellNetwork,
    images: Tensor,
    labels: Tensor,
    genotype: Genotype | None = None,
    batch: int = EVALUATION_BATCH,
) -> float:
    """Share of images classified right, from 0 to 1; see ``accuracies``."""
    return accuracies(network, images, labels, [genotype], batch)[0]


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """Learning rate at ``step`` of ``steps`` on a half cosine from ``first`` to ``last``."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class TrainConfig:
    """Training a standalone network from scratch.

    SGD with momentum on cross entropy, cosine learning rate from ``lr`` to ``lr_last``, random
    crops (an eighth of the side) and flips, ``cutout`` pixels, gradient norm clipped to ``clip``.
    ``drop_path`` is the probability of dropping what an edge adds, growing linearly from 0 over the
    epochs; ``auxiliary`` the weight of the auxiliary head's loss, 0 for none; ``smoothing`` the
    share of each label that is spread over all classes. As published they are 0.2, 0.4 and 0 on
    CIFAR-10, and 0, 0.4 and 0.1 on ImageNet (NAT, Sec. 5.1). Raises NatlibError on values outside
    [0, 1), for ``auxiliary`` on negative ones.
    """

    data: DataConfig
    macro: Macro
    genotype: Genotype
    seed: int
    epochs: int
    batch: int = 96
    lr: float = 0.025
    lr_last: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    cutout: int = 0
    drop_path: float = field(default=0.0, metadata=ADDED_LATER)
    auxiliary: float = field(default=0.0, metadata=ADDED_LATER)
    smoothing: float = field(default=0.0, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        for name, top in (("drop_path", 1.0), ("smoothing", 1.0), ("auxiliary", math.inf)):
            value = getattr(self, name)
            if not 0 <= value < top:
                raise NatlibError(f"{name} = {value!r}; it must be at least 0 and below {top:g}")


def augmented(
    raw: Tensor, mean: Tensor, std: Tensor, generator: torch.Generator, cutout: int = 0
) -> Tensor:
    """Return a normalised, augmented batch (crop by an eighth of the side, flip, cutout)."""
    x = data.augment(raw, generator, pad=raw.shape[-1] // 8)
    x = data.normalise(x, mean, std)
    if cutout:
        x = data.augment(x, generator, pad=0, flip=False, cutout=cutout)
    return x


def sgd(network: CellNetwork, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """Return the optimizer of both papers for a network's weights; the caller sets the rate."""
    return torch.optim.SGD(
        network.parameters(), lr=0.0, momentum=momentum, weight_decay=weight_decay
    )


class CapturedStep:
    """A training step of a fixed network on an accelerator: its many small kernels as one launch.

    ``step`` takes a batch, its labels and the rate as a tensor, and returns the loss; it may not
    wait for the accelerator, draw random numbers there or build anything that outlives it. The
    first ``WARM`` calls run it as it is, the next one records it as a CUDA graph, which all later
    calls replay on batches of the same shape. The results are the same.
    """

    WARM = 3

    def __init__(self, step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.step, self.calls = step, 0
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.graph = torch.cuda.CUDAGraph()
        self.lr = torch.zeros((), device="cuda")

    def __call__(self, x: Tensor, labels: Tensor, lr: float) -> Tensor:
        self.calls += 1
        self.lr.fill_(lr)
        if self.calls <= self.WARM:
            # Beside the usual stream, as recording will: allocations belong to a stream.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(x, labels, self.lr)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.calls == self.WARM + 1:
            self.x, self.labels = x.clone(), labels.clone()
            # Other threads of the process, as the loader's, may go on meanwhile.
            with torch.cuda.graph(
                self.graph, stream=self.stream, capture_error_mode="thread_local"
            ):
                self.loss = self.step(self.x, self.labels, self.lr)
        else:
            self.x.copy_(x)
            self.labels.copy_(labels)
        self.graph.replay()
        return self.loss


def sgd_step(
    optimizer: torch.optim.SGD,
    loss: Tensor,
    lr: float | Tensor,
    clip: float,
) -> None:
    """Backward, clip, step; with ``lr`` a tensor on the accelerator nothing waits for it."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    # Of the optimizer's list: walking through a supernet's modules takes a tenth of a step.
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_([p for p in weights if p.grad is not None], clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
        if isinstance(lr, Tensor):
            group["fused"], group["foreach"] = True, False
    optimizer.step()


class Batches(Protocol):
    """Where the images of a training come from: ``steps`` batches an epoch."""

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        ...

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over an epoch's batches, shuffled and augmented, with their labels."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Batches of ``raw`` uint8 images (N, C, H, W) with ``labels`` (N,), see ``augmented``."""

    raw: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    batch: int
    cutout: int = 0

    @staticmethod
    def of(parts: Splits, batch: int, cutout: int = 0) -> InMemory:
        """Batches of the training part."""
        part = parts.train
        return InMemory(part.raw, part.labels, parts.mean, parts.std, batch, cutout)

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return len(self.labels) // self.batch

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over an epoch's batches, shuffled and augmented, with their labels."""
        for index in data.index_batches(len(self.labels), self.batch, generator):
            index = index.to(self.labels.device, non_blocking=True)
            x = augmented(self.raw[index], self.mean, self.std, generator, self.cutout)
            yield x, self.labels[index]


def train_epochs(
    run: Run,
    network: CellNetwork,
    logits: Callable[[Tensor, torch.Generator], Any],
    *,
    what: str = "training",
    batches: Batches | None = None,
    criterion: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    kept: Mapping[str, list[Any]] | None = None,
    before: Callable[[int], None] | None = None,
    after: Callable[[int], None] | None = None,
    fixed: bool = False,
) -> list[float]:
    """Train a network for the epochs that a run still lacks, resuming from its last checkpoint.

    ``run.config`` has ``seed``, ``epochs``, ``batch``, ``lr``, ``lr_last``, ``momentum``,
    ``weight_decay``, ``clip`` and, unless ``batches`` are given, ``data``. ``logits`` maps an
    augmented batch, and the epoch's generator, to the network's output, which ``criterion``
    compares with the labels. ``before`` and ``after`` are called with the number of finished
    epochs; the lists in ``kept`` that ``after`` fills stand in checkpoints too, and are filled
    again on resume. ``fixed`` says that every step does the same to its batch, without random
    numbers: then it is a ``CapturedStep`` on an accelerator. Returns the mean training loss of each
    epoch. Raises NatlibError if training diverges, naming ``what``.
    """
    config = run.config
    batches = batches or InMemory.of(splits(config.data), config.batch)
    where = device()
    optimizer = sgd(network, config.momentum, config.weight_decay)
    kept = {"losses": [], **(kept or {})}
    losses = kept["losses"]
    if state := run.load_checkpoint():
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        for name, values in kept.items():
            values[:] = state[name]
    steps = batches.steps

    def plain(x: Tensor, labels: Tensor, lr: float | Tensor) -> Tensor:
        loss = criterion(logits(x, generator), labels)
        sgd_step(optimizer, loss, lr, config.clip)
        return loss.detach()

    step: Callable[[Tensor, Tensor, float], Tensor] = plain
    if fixed and where.type == "cuda":
        step = CapturedStep(plain)
    for epoch in range(len(losses), config.epochs):
        generator = stream(config.seed, "epoch", epoch)
        network.train()
        if before is not None:
            before(epoch)
        total = torch.zeros((), device=where)
        for i, (x, labels) in enumerate(batches.epoch(generator)):
            lr = cosine(epoch * steps + i, config.epochs * steps, config.lr, config.lr_last)
            total += step(x, labels, lr)
            run.progress(epoch * steps + i + 1, config.epochs * steps)
        losses.append(float(total) / steps)
        if not math.isfinite(losses[-1]):
            raise NatlibError(
                f"{what} diverged in epoch {epoch + 1}; try a lower lr than {config.lr}"
            )
        if after is not None:
            after(epoch + 1)
        if run.checkpoint_due() and epoch + 1 < config.epochs:
            run.save_checkpoint(
                {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    **kept,
                }
            )
    return losses


def fit(run: Run, batches: Batches | None = None) -> tuple[CellNetwork, list[float]]:
    """Train the ``TrainConfig`` of a run from scratch, resuming from its last checkpoint.

    With ``batches`` a configuration without ``data`` and ``cutout`` will do.
    Returns the network in evaluation mode and the mean training loss of each epoch. Raises
    NatlibError if training diverges.
    """
    config: TrainConfig = run.config
    network = CellNetwork(
        config.macro, genotype=config.genotype, generator=stream(config.seed, "weights"),
        auxiliary=config.auxiliary > 0,
    ).to(device())  # fmt: skip

    def logits(x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        if config.auxiliary:
            return network.with_auxiliary(x, generator=generator)
        return (network(x, generator=generator),)

    def criterion(logits: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        losses = [F.cross_entropy(z, labels, label_smoothing=config.smoothing) for z in logits]
        return losses[0] if len(losses) == 1 else losses[0] + config.auxiliary * losses[1]

    def before(epoch: int) -> None:
        network.drop_path = config.drop_path * epoch / config.epochs

    if batches is None:
        batches = InMemory.of(splits(config.data), config.batch, config.cutout)
    losses = train_epochs(
        run, network, logits, batches=batches, criterion=criterion, before=before,
        fixed=config.drop_path == 0,
    )  # fmt: skip
    return network.eval(), losses


def train_standalone(run: Run) -> dict[str, Any]:
    """Train a ``TrainConfig`` from scratch; body of records of kind "train".

    Returns accuracies in 0..1: ``report_accuracy`` (validation) and ``test_accuracy``, the loss of
    each epoch, params and MAdds. The trained weights are the artifact "weights".
    """
    config: TrainConfig = run.config
    network, losses = fit(run)
    parts = splits(config.data)
    run.save_artifact("weights", network.state_dict())
    cost = network_cost(config.genotype, config.macro)
    return {
        "report_accuracy": accuracy(network, parts.report.normalised, parts.report.labels),
        "test_accuracy": accuracy(network, parts.test.normalised, parts.test.labels),
        "losses": losses,
        "params": cost.params,
        "madds": cost.madds,
    }
