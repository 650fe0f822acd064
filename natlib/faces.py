"""Networks for face verification: trained on people, judged on pairs of people never seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from natlib import data, zoo
from natlib.cost import network_cost
from natlib.errors import NatlibError
from natlib.genotype import Genotype
from natlib.macro import MacroConfig
from natlib.network import CellNetwork
from natlib.records import Record, Run, RunStore
from natlib.search import settings
from natlib.train import (
    EVALUATION_BATCH,
    LEARNED_ENOUGH,
    InMemory,
    device,
    fit,
    learned_enough,
)
from natlib.transitions import ORIGINAL, TITLES
from natlib.verification import verification

RECIPE = 1


@dataclass(frozen=True)
class FaceConfig:
    """Training a network to tell people apart, who appear in none of the folds ``held``.

    ``macro.classes`` are the people with ``least`` images or more outside those folds, of
    ``train_images`` images in all; ``test_images`` stand in the held folds' pairs. Pairs are judged
    by the cosine of the pooled features, each image's and its mirror's added. Training as in
    ``TrainConfig``.
    """

    macro: MacroConfig
    genotype: Genotype
    seed: int
    held: tuple[int, ...]
    least: int
    train_images: int
    test_images: int
    epochs: int
    batch: int = 96
    lr: float = 0.025
    lr_last: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    drop_path: float = 0.0
    auxiliary: float = 0.0
    smoothing: float = 0.0


@dataclass(frozen=True)
class Halves:
    """Which images train and which are judged: indexes of images, a label for each of the first."""

    train: Tensor
    labels: Tensor
    judged: Tensor


def lacks() -> str:
    """Say in words that LFW is not there and how to get it; "" where it is."""
    try:
        data.load_faces()
    except data.Absent as error:
        return str(error)
    return ""


@lru_cache(maxsize=1)
def _small(size: int) -> tuple[data.Faces, Tensor]:
    faces = data.load_faces()
    return faces, faces.images.resized(size).images


def halves(faces: data.Faces, held: Sequence[int], least: int) -> Halves:
    """Divide LFW's images: people of the folds ``held`` are judged, all others may train.

    Raises NatlibError on fewer than two folds, for a threshold comes from another fold whose people
    are new to the network too, and where nobody else has ``least`` images.
    """
    if len(held) < 2:
        raise NatlibError(f"folds {list(held)} are held out together; two or more are needed")
    people = faces.images.labels
    inside = torch.isin(faces.fold, torch.tensor(held))
    judged = torch.unique(faces.pairs[inside])
    barred = torch.zeros(len(faces.images.classes), dtype=torch.bool)
    barred[people[judged]] = True
    allowed = ~barred & (torch.bincount(people, minlength=len(barred)) >= least)
    if int(allowed.sum()) < 2:
        raise NatlibError(f"least = {least}; nobody outside folds {list(held)} has as many images")
    train = torch.nonzero(allowed[people])[:, 0]
    return Halves(train, torch.cumsum(allowed, 0)[people[train]] - 1, judged)


@torch.no_grad()
def embeddings(network: CellNetwork, images: Tensor) -> Tensor:
    """Pooled features (N, D), on the CPU, of normalised images and their mirror images, added.

    The network's classifier is replaced by one that passes its inputs on.
    """
    last = network.classifier = torch.nn.Linear(network.classifier.in_features, 1)
    last.weight = torch.nn.Parameter(torch.eye(last.in_features, device=device()))
    last.bias = torch.nn.Parameter(torch.zeros(last.in_features, device=device()))
    parts = [x.to(device()) for x in torch.split(images, EVALUATION_BATCH)]
    return torch.cat([(network(x) + network(x.flip(3))).cpu() for x in parts])


def train_faces(run: Run) -> dict[str, Any]:
    """Train a ``FaceConfig`` from scratch; body of records of kind "faces".

    Returns the verification ``accuracies`` (0..1) of the held folds, each with the threshold that
    the other held folds choose, the training ``losses``, params and MAdds.
    """
    config: FaceConfig = run.config
    faces, images = _small(config.macro.image_size)
    parts = halves(faces, config.held, config.least)
    own = images[parts.train].float() / 255
    mean, std = own.mean().reshape(1), own.std().reshape(1)
    where = device()
    batches = InMemory(
        images[parts.train].to(where), parts.labels.to(where), mean, std, config.batch
    )
    network, losses = fit(run, batches)
    judged = data.normalise(images[parts.judged], mean, std)
    inside = torch.isin(faces.fold, torch.tensor(config.held))
    pairs = torch.searchsorted(parts.judged, faces.pairs[inside])
    found = verification(embeddings(network, judged), pairs, faces.same[inside], faces.fold[inside])
    cost = network_cost(config.genotype, config.macro)
    return {
        "accuracies": list(found.accuracies),
        "losses": losses,
        "params": cost.params,
        "madds": cost.madds,
    }


def trained(
    genotypes: Mapping[str, Sequence[Genotype]],
    seeds: Sequence[int],
    training: Mapping[str, Any],
    workers: int,
) -> dict[str, list[list[Record]]]:
    """Train each method's network of each seed for every group of folds: method, seed, group.

    ``genotypes`` holds one a seed. ``training`` maps ``image_size``, ``channels`` and ``cells`` of
    the network, ``groups``, how many the ten folds are dealt into (each is judged by a network of
    its own), ``least``, and the rest of a ``FaceConfig``. Raises NatlibError where LFW cannot be
    had and on other settings.
    """
    faces = data.load_faces()
    given = dict(training)
    sizes = {name: given.pop(name) for name in ("image_size", "channels", "cells")}
    groups, least = given.pop("groups"), given.pop("least")
    held = [tuple(range(10))[i::groups] for i in range(groups)]
    parts = [halves(faces, folds, least) for folds in held]
    configs = [
        settings(
            FaceConfig,
            {
                "macro": MacroConfig(**sizes, classes=int(p.labels.max()) + 1, image_channels=1),
                "genotype": genotype,
                "seed": seed,
                "held": folds,
                "least": least,
                "train_images": len(p.train),
                "test_images": len(p.judged),
                **given,
            },
        )
        for own in genotypes.values()
        for genotype, seed in zip(own, seeds, strict=True)
        for folds, p in zip(held, parts, strict=True)
    ]
    found = RunStore.default().run_many(
        "faces", configs, train_faces, recipe=RECIPE, data=faces.images.checksum, workers=workers
    )
    by_seed = [found[i : i + groups] for i in range(0, len(found), groups)]
    n = len(seeds)
    return {name: by_seed[i * n : (i + 1) * n] for i, name in enumerate(genotypes)}


def accuracies(by_seed: Sequence[Sequence[Record]]) -> list[float]:
    """Mean accuracy over all ten folds, one a seed, of what ``trained`` gives for a method."""
    means = []
    for group in by_seed:
        folds = [a for record in group for a in record.result["accuracies"]]
        means.append(sum(folds) / len(folds))
    return means


def cells(
    network: str,
    derived: Mapping[int, Record],
    rules: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, list[Genotype]]:
    """A published cell as it is and as policies derived it: method, one genotype for each seed.

    ``derived`` are records of kind "derive" by the seed of their supernet.
    """
    rewritten = {
        TITLES[rule]: [
            Genotype.from_json(derived[seed].result[network][rule]["genotype"]) for seed in seeds
        ]
        for rule in rules
    }
    return {ORIGINAL: [zoo.get(network)] * len(seeds), **rewritten}


def rows(found: Mapping[str, Sequence[Sequence[Record]]]) -> dict[str, dict[str, list[float]]]:
    """Rows for ``evidence.keep`` of what ``trained`` gives: accuracy, its change, that of MAdds.

    Half of all pairs show one person: guessing gets those right.
    """
    accuracy = {method: accuracies(by_seed) for method, by_seed in found.items()}
    madds = {
        method: [np.mean([r.result["madds"] for r in group]) for group in by_seed]
        for method, by_seed in found.items()
    }
    kept = {}
    for method, values in accuracy.items():
        kept[method] = {"accuracy (%)": values}
        if method == ORIGINAL:
            learned = learned_enough(float(np.mean(values)), 1 / 2)
            kept[method][LEARNED_ENOUGH] = [float(learned)] * len(values)
        else:
            change = np.subtract(values, accuracy[ORIGINAL])
            kept[method]["change (points)"] = change.tolist()
            kept[method]["MAdds change (%)"] = (
                np.divide(madds[method], madds[ORIGINAL]) - 1
            ).tolist()
    return kept
