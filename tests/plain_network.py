"""The mathematics of ``network.py`` and ``policy.py`` in literal PyTorch, to test and time against.

Plain modules on contiguous tensors, an operation at a time, as one would write them from the
papers: dilated kernels, strided slices, pooling and concatenation by their ordinary functions.
Nothing here is used to produce results.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from natlib.genotype import INPUTS, Cell, Genotype
from natlib.macro import BlockMacro, Layer
from natlib.network import CellNetwork
from natlib.operations import EPSILON, takes_relu
from natlib.policy import CellBatch, GCNLogits
from natlib.primitives import Primitive, primitive
from natlib.transitions import edge_stride

Weights = dict[str, Tensor]


def _norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.batch_norm(
        x, None, None, w.get(f"{name}.weight"), w.get(f"{name}.bias"), True, 0.1, EPSILON
    )


def _factorized(x: Tensor, w: Weights, name: str) -> Tensor:
    x = F.relu(x)
    even = F.conv2d(x, w[f"{name}.even.weight"], stride=2)
    odd = F.conv2d(x[:, :, 1:, 1:], w[f"{name}.odd.weight"], stride=2)
    return _norm(torch.cat([even, odd], 1), w, f"{name}.bn")


def _separable(x: Tensor, w: Weights, name: str, stride: int) -> Tensor:
    depthwise, pointwise = w[f"{name}.layers.0.weight"], w[f"{name}.layers.1.weight"]
    x = F.conv2d(F.relu(x), depthwise, None, stride, depthwise.shape[2] // 2, 1, x.shape[1])
    return _norm(F.conv2d(x, pointwise), w, f"{name}.bn")


def _operation(x: Tensor, p: Primitive, w: Weights, name: str, stride: int) -> Tensor:
    """Apply a primitive the way the papers define it."""
    k = p.size
    if p.kind == "null":
        return x[:, :, ::stride, ::stride] * 0
    if p.kind == "skip":
        return x if stride == 1 else _factorized(x, w, name)
    if p.kind == "max_pool":
        return _norm(F.max_pool2d(x, k, stride, k // 2), w, f"{name}.bn")
    if p.kind == "avg_pool":
        y = F.avg_pool2d(x, k, stride, k // 2, count_include_pad=False)
        return _norm(y, w, f"{name}.bn")
    if p.kind == "sep_conv":
        return _separable(_separable(x, w, f"{name}.0", stride), w, f"{name}.2", 1)
    if p.kind == "dil_conv":
        depthwise, pointwise = w[f"{name}.layers.0.weight"], w[f"{name}.layers.1.weight"]
        y = F.conv2d(F.relu(x), depthwise, None, stride, k - 1, 2, x.shape[1])
        return _norm(F.conv2d(y, pointwise), w, f"{name}.bn")
    weight = w[f"{name}.layers.0.weight"]
    return _norm(F.conv2d(F.relu(x), weight, None, stride, k // 2), w, f"{name}.bn")


def _input_layer(x: Tensor, w: Weights, name: str, halve: bool) -> Tensor:
    if halve:
        return _factorized(x, w, f"{name}.reduction")
    return _norm(F.conv2d(F.relu(x), w[f"{name}.conv.weight"]), w, f"{name}.bn")


def _run_cell(s0: Tensor, s1: Tensor, cell: Cell, kind: str, w: Weights, name: str) -> Tensor:
    values = [s0, s1]
    for group in cell.in_edges:
        terms = []
        for e in group:
            key = f"{name}.edges.{e.source}_{e.target}_{e.primitive}"
            stride = edge_stride(e.source, kind)
            terms.append(_operation(values[e.source], primitive(e.primitive), w, key, stride))
        values.append(sum(terms[1:], terms[0]))
    return torch.cat([values[n] for n in cell.concat], 1)


def supernet_forward(supernet: CellNetwork, images: Tensor, genotype: Genotype) -> Tensor:
    """Compute what ``supernet(images, genotype)`` computes, for cells that concatenate all nodes.

    ``images`` (B, C, H, W) in contiguous memory; returns logits (B, classes) with gradients to the
    supernet's parameters. The 13 primitives of NAT++ only. Takes a standalone network too, in
    training, with its own genotype: any concat, no edge twice.
    """
    w = {n: p.contiguous() for n, p in supernet.named_parameters()}
    x = _norm(F.conv2d(images, w["stem.weight"], padding=1), w, "stem_bn")
    before, last = x, x
    for i, place in enumerate(supernet.macro.positions()):
        cell = genotype.reduce if place.kind == "reduce" else genotype.normal
        everyone = tuple(range(INPUTS, INPUTS + cell.nodes))
        assert supernet.nodes is None or cell.concat == everyone
        s0 = _input_layer(before, w, f"cells.{i}.inputs.0", place.halve)
        s1 = _input_layer(last, w, f"cells.{i}.inputs.1", False)
        before, last = last, _run_cell(s0, s1, cell, place.kind, w, f"cells.{i}")
    return F.linear(last.mean((2, 3)), w["classifier.weight"], w["classifier.bias"])


def _row(x: Tensor, layers: Iterable[Layer], w: Weights, name: str) -> Tensor:
    """Apply layers in a row, whose weights are numbered as modules are."""
    index = 0
    for layer in layers:
        if layer.kind == "activation":
            x = F.relu(x)
        elif layer.kind == "max_pool":
            x = F.max_pool2d(x, layer.kernel, layer.stride, layer.padding)
        elif layer.kind == "avg_pool":
            x = F.avg_pool2d(x, layer.kernel, layer.stride, layer.padding, count_include_pad=False)
        else:
            groups = x.shape[1] if layer.kind == "depthwise" else 1
            weight = w[f"{name}.{index}.weight"]
            x = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, groups)
            if layer.norm:
                index += 1
                x = _norm(x, w, f"{name}.{index}")
        index += 1
    return x


def blocks_forward(network: CellNetwork, images: Tensor) -> Tensor:
    """Compute what a hand-crafted network without hidden layers computes in training.

    ``images`` (B, C, H, W) in contiguous memory; returns logits (B, classes) with gradients to the
    network's parameters. Every node has an edge that is not null, none twice; blocks of ResNet.
    """
    macro, genotype = network.macro, network.genotype
    assert isinstance(macro, BlockMacro) and genotype is not None
    w = {n: p.contiguous() for n, p in network.named_parameters()}
    before = last = _row(images, macro.stem, w, "stems.0")
    for i, place in enumerate(macro.positions()):
        cell = genotype.reduce if place.kind == "reduce" else genotype.normal
        assert place.block is not None
        values = [before, last]
        for group in cell.in_edges:
            terms = []
            for e in group:
                p, x = primitive(e.primitive), values[e.source]
                if p.kind == "null":
                    continue
                layers = place.block.layers(p, e.source, e.target)
                if layers and takes_relu(p) and e.source >= INPUTS:
                    x = F.relu(x)
                key = f"cells.{i}.edges.{e.source}_{e.target}_{e.primitive}"
                terms.append(_row(x, layers, w, key))
            values.append(sum(terms[1:], terms[0]))
        before, last = last, F.relu(values[cell.concat[0]])
    pooled = _row(last, macro.head, w, "head").mean((2, 3))
    return F.linear(pooled, w["classifier.weight"], w["classifier.bias"])


def policy_logits(logits: GCNLogits, batch: CellBatch) -> Tensor:
    """Compute what ``logits(batch)`` computes, with every node embedded and projected by itself.

    Returns (B, N, D, K) with gradients to the policy's parameters.
    """
    b, n, d = batch.primitives.shape
    most, k, e = logits.config.degree, logits.primitives, logits.config.embedding
    slots = torch.arange(d) * k
    embedded = logits.edge(batch.primitives + slots) * batch.present[..., None]
    node = F.pad(embedded.flatten(2), (0, (most - d) * e))
    x = torch.cat([logits.input.weight.expand(b, -1, -1), node], 1)
    x = x + logits.kind(batch.reduction.long())[:, None]
    a = logits.adjacency(batch)
    x = F.relu(a @ logits.first(F.relu(logits.project(x))))
    z: Tensor = logits.head(a @ logits.second(x))
    return z[:, INPUTS:].view(b, n, most, k)[:, :, :d]
