"""Policies over transitions: graph-convolution, LSTM and random ones, batched, and BMSoftmax."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from natlib.allocation import allocate, embedding
from natlib.errors import NatlibError
from natlib.genotype import INPUTS, PRIMITIVE, SOURCE, TARGET, Genotype
from natlib.transitions import Transitions


def _masked_rows(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits (K, ...) with -inf where the mask is off; K stands first in memory.

    The CPU library takes a softmax over few neighbours element by element, one over a first
    dimension many rows at a time: ten times as fast for K = 13.
    """
    if not bool(mask.any(-1).all()):
        raise NatlibError("BMSoftmax got a mask that allows nothing; each row needs one True")
    return logits.masked_fill(~mask, -math.inf).movedim(-1, 0).contiguous()


def bm_log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Logarithm of ``bm_softmax``; -inf where the mask is off, gradient exactly 0 there.

    ``logits`` (..., K) finite, ``mask`` bool, broadcastable to it. Raises NatlibError where a row
    allows nothing.
    """
    return _masked_rows(logits, mask).log_softmax(0).movedim(0, -1)


def bm_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Binary-Masked Softmax: p_i = m_i exp(x_i) / sum_j m_j exp(x_j) over the last dimension.

    ``logits`` (..., K), ``mask`` bool, broadcastable to it. Masked entries have probability and
    gradient exactly 0; finite logits of any size give finite results. Raises NatlibError where a
    row allows nothing. Source: NAT++ (TPAMI 2021), Sec. 4.2.
    """
    return _masked_rows(logits, mask).softmax(0).movedim(0, -1)


def draw(log_probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw R times (..., R) from each row of log-probabilities (..., K), never what is at -inf.

    ``uniform`` (broadcastable to the result) holds a number in [0, 1) for each. What is drawn is
    the first index whose cumulative probability exceeds it, as a share of the last one.
    """
    # A softmax of logarithms is their exponential, without its slow path for -inf.
    p = log_probabilities.detach().movedim(-1, 0).softmax(0).movedim(0, -1)
    cumulative = p.contiguous().cumsum(-1)
    top = cumulative[..., -1:]
    at = torch.minimum(uniform * top, torch.nextafter(top, torch.zeros_like(top)))
    return torch.searchsorted(cumulative, at, right=True)


def entropy_terms(log_probabilities: Tensor) -> Tensor:
    """Return -p log p (nats), elementwise: 0 where p is 0, in the gradient as well."""
    finite = log_probabilities.masked_fill(torch.isinf(log_probabilities), 0)
    return -(finite.exp() * finite)


@dataclass(frozen=True)
class CellBatch:
    """Cells as index tensors: B cells, N intermediate nodes, D incoming edges a node, padded.

    ``primitives`` and ``sources`` int64 (B, N, D); ``present`` bool (B, N, D), False for padding;
    ``reduction`` bool (B,). Two consecutive cells are one genotype's normal and reduction cell.
    """

    primitives: Tensor
    sources: Tensor
    present: Tensor
    reduction: Tensor

    def __len__(self) -> int:
        return self.primitives.shape[0]

    def strides(self) -> Tensor:
        """Stride index (0: stride 1, 1: stride 2) of each edge, int64 (B, N, D)."""
        return (self.reduction[:, None, None] & (self.sources < INPUTS)).long()

    def to(self, device: torch.device) -> CellBatch:
        """Move to a device."""
        return CellBatch(*(t.to(device) for t in (
            self.primitives, self.sources, self.present, self.reduction
        )))  # fmt: skip

    @staticmethod
    def encode(genotypes: Sequence[Genotype], primitives: Sequence[str]) -> CellBatch:
        """Encode genotypes, two cells each; smaller cells are padded.

        Raises NatlibError on an empty list or a primitive outside ``primitives``.
        """
        if not genotypes:
            raise NatlibError("cannot encode an empty list of genotypes")
        index = {name: i for i, name in enumerate(primitives)}
        groups = [cell.edges for g in genotypes for _, cell in g.cells]
        edges = list(chain.from_iterable(groups))

        def numbers(values: Iterable[int], count: int = len(edges)) -> NDArray[np.int64]:
            return np.fromiter(values, np.int64, count)

        try:
            known = numbers(map(index.__getitem__, map(PRIMITIVE, edges)))
        except KeyError as error:
            raise NatlibError(
                f"primitive {error} is not in this policy's search space; "
                f"allowed are {', '.join(primitives)}"
            ) from None
        cell = np.repeat(np.arange(len(groups)), numbers(map(len, groups), len(groups)))
        node = numbers(map(TARGET, edges)) - INPUTS
        # A cell's edges stand grouped by target: an edge's slot is its distance from the first.
        first = np.flatnonzero(np.diff(cell * (node.max() + 1) + node, prepend=-1))
        slot = np.arange(len(edges)) - np.repeat(first, np.diff(first, append=len(edges)))
        shape = (len(groups), int(node.max()) + 1, int(slot.max()) + 1)

        def placed(values: NDArray[Any]) -> Tensor:
            padded = np.zeros(shape, values.dtype)
            padded[cell, node, slot] = values
            return torch.from_numpy(padded)

        return CellBatch(
            placed(known),
            placed(numbers(map(SOURCE, edges))),
            placed(np.ones(len(edges), dtype=bool)),
            torch.tensor([False, True]).repeat(len(genotypes)),
        )


def decode(genotypes: Sequence[Genotype], actions: Tensor, names: Sequence[str]) -> list[Genotype]:
    """Put actions (2 len(genotypes), N, D), primitive indexes, onto the genotypes' edges."""
    out = []
    width = actions.shape[2]
    rows = iter(actions.flatten(1).tolist())
    for g in genotypes:
        cells = []
        for _, cell in g.cells:
            row = next(rows)
            if len(row) > len(cell.edges):
                starts = range(0, cell.nodes * width, width)
                groups = zip(starts, cell.in_edges, strict=True)
                row = [a for start, group in groups for a in row[start : start + len(group)]]
            cells.append(cell.with_primitives([names[a] for a in row]))
        out.append(Genotype(*cells))
    return out


@dataclass(frozen=True)
class Rollout:
    """One sampled rewriting of each input: genotypes, log-probability and entropy, (len,) each.

    ``log_probability`` and ``entropy`` (nats) are sums over the choices of both cells and carry
    gradients.
    """

    genotypes: list[Genotype]
    log_probability: Tensor
    entropy: Tensor


class Logits(Protocol):
    """What a policy network is: logits (B, N, D, K) for a batch of cells."""

    def __call__(self, batch: CellBatch) -> Tensor:
        """Compute logits of the K primitives for each edge."""
        ...


class UniformLogits(nn.Module):
    """The random policy: every allowed transition equally likely."""

    def __init__(self, primitives: int) -> None:
        super().__init__()
        self.primitives = primitives

    def forward(self, batch: CellBatch) -> Tensor:
        """Return zeros (B, N, D, K)."""
        return batch.present.new_zeros(
            (*batch.primitives.shape, self.primitives), dtype=torch.float
        )


@dataclass(frozen=True)
class GCNConfig:
    """Sizes of the graph-convolution policy.

    Defaults are the published ones (node feature 1024, hidden 100, embedding 100). ``degree`` is
    the largest number of incoming edges a node may have. ``graph`` "both" links nodes along edges
    in both directions with self loops, symmetrically normalised; "residual" adds each node's own
    features once more, since where all nodes are linked (natbench, NAS-Bench-201) the mean over
    neighbours and itself is the same for every node; "released" is the form of the
    authors' code, directed, without self loops or normalisation, which leaves most edges' logits
    blind to the edge's own primitive.
    """

    embedding: int = 100
    feature: int = 1024
    hidden: int = 100
    degree: int = 2
    graph: str = "both"

    def __post_init__(self) -> None:
        if self.graph not in ("both", "residual", "released"):
            raise NatlibError(f"graph {self.graph!r} is not one of 'both', 'residual', 'released'")


@torch.no_grad()
def _draw_weights(
    network: nn.Module,
    embeddings: tuple[str, ...],
    gain: float,
    generator: torch.Generator | None,
) -> None:
    """Draw embeddings normally, matrices uniformly with variance gain / 3 / inputs, biases as 0."""
    generator = generator or torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if name.startswith(embeddings):
            weight.normal_(generator=generator)
        elif weight.ndim > 1:
            bound = math.sqrt(gain / weight.shape[1])
            if name.startswith("head"):
                # Start near the uniform policy: the first rollouts explore.
                bound *= 0.05
            weight.uniform_(-bound, bound, generator=generator)
        else:
            weight.zero_()


class GCNLogits(nn.Module):
    """Two graph convolutions over a cell, then K logits for each incoming edge of a node.

    Z = A relu(A X W0) W1 W_fc (NAT, Eq. 8), X from the embeddings of the incoming primitives, of
    the inputs, and of the cell's type. Weights are drawn from ``generator``, or from one of seed 0.
    """

    def __init__(
        self, primitives: int, config: GCNConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config, self.primitives = config, primitives
        e, d = config.embedding, config.degree
        with torch.device("meta"):
            self.edge = embedding(d * primitives, e)
            self.input = embedding(INPUTS, d * e)
            self.kind = embedding(2, d * e)
            self.project = nn.Linear(d * e, config.feature)
            self.first = nn.Linear(config.feature, config.hidden, bias=False)
            self.second = nn.Linear(config.hidden, config.hidden, bias=False)
            self.head = nn.Linear(config.hidden, d * primitives)
        allocate(self, "cpu")
        _draw_weights(self, ("edge", "input", "kind"), 6.0, generator)

    def adjacency(self, batch: CellBatch) -> Tensor:
        """Matrix (B, N + 2, N + 2) whose row mixes what a node receives."""
        b, n, d = batch.primitives.shape
        flat = torch.arange(INPUTS, INPUTS + n, device=batch.sources.device)
        target = flat[:, None].expand(n, d).reshape(-1).expand(b, -1)
        a = self.head.weight.new_zeros(b, n + INPUTS, n + INPUTS)
        rows = torch.arange(b, device=a.device)[:, None].expand_as(target)
        a.index_put_(
            (rows, target, batch.sources.reshape(b, -1)),
            batch.present.reshape(b, -1).to(a.dtype),
            accumulate=True,
        )
        if self.config.graph == "released":
            return a
        loops = torch.eye(n + INPUTS).to(a)
        a = (a + a.transpose(1, 2)).clamp(max=1) + loops
        scale = a.sum(2).rsqrt()
        a = a * scale[:, :, None] * scale[:, None, :]
        return a + loops if self.config.graph == "residual" else a

    def distinct_rows(self, batch: CellBatch) -> tuple[Tensor, Tensor]:
        """Codes of the distinct nodes of a batch, and where each node's is (B (N + 2),), int64.

        A node's features depend on its incoming primitives and its cell's type alone, so a batch
        of any size holds few distinct ones. A code's digits, from the last: the cell's type, then,
        in base K + 1, one more than the incoming primitive of each slot (0: none); the codes of
        the two inputs follow those of all nodes.
        """
        base = self.primitives + 1
        powers = 2 * base ** torch.arange(batch.primitives.shape[2], device=batch.sources.device)
        codes = ((batch.primitives + 1) * batch.present * powers).sum(2)
        inputs = 2 * base**self.config.degree + 2 * torch.arange(INPUTS).to(codes)
        codes = torch.cat([inputs.expand(len(batch), -1), codes], 1) + batch.reduction[:, None]
        distinct, where = torch.unique(codes, return_inverse=True)
        return distinct, where.flatten()

    def project_nodes(self, codes: Tensor) -> Tensor:
        """Project the embeddings of nodes of the given codes (R,): (R, feature).

        The projection of a concatenation is a sum with a term for each slot, and every term is one
        of K: they are computed once.
        """
        base, slots, e = self.primitives + 1, self.config.degree, self.config.embedding
        first = 2 * base**slots
        powers = 2 * base ** torch.arange(slots, device=codes.device)
        digits = torch.where(codes[:, None] < first, codes[:, None] // powers % base, 0)
        picks = torch.cat(
            [
                F.one_hot(digits, base)[:, :, 1:].flatten(1),
                codes[:, None] // 2 - first // 2 == torch.arange(INPUTS, device=codes.device),
                F.one_hot(codes % 2, 2),
            ],
            1,
        )
        # Each slot's embeddings in its own columns: all terms are then one product.
        by_slot = torch.split(self.edge.weight, self.primitives)
        wide = [F.pad(w, (i * e, (slots - 1 - i) * e)) for i, w in enumerate(by_slot)]
        terms = torch.cat([*wide, self.input.weight, self.kind.weight]) @ self.project.weight.T
        return torch.addmm(self.project.bias, picks.to(terms.dtype), terms)

    def forward(self, batch: CellBatch) -> Tensor:
        """Compute logits (B, N, D, K); raises NatlibError where a node has too many inputs."""
        b, n, d = batch.primitives.shape
        most, k = self.config.degree, self.primitives
        if d > most:
            raise NatlibError(f"a node has {d} incoming edges; this policy was built for {most}")
        rows, where = self.distinct_rows(batch)
        features = self.first(F.relu(self.project_nodes(rows), inplace=True))
        x = features.index_select(0, where).view(b, n + INPUTS, -1)
        a = self.adjacency(batch)
        hidden = torch.bmm(a[:, INPUTS:], F.relu(torch.bmm(a, x), inplace=True))
        # The second convolution's weights and the head have no nonlinearity between them.
        weight = self.head.weight @ self.second.weight
        logits = F.linear(hidden, weight, self.head.bias).view(b, n, most, k)
        return logits[:, :, :d]


WAVES = (0.5, 1.0, 2.0, 4.0)
"""Wavelengths / 2π of the sines by which the LSTM tells nodes apart: near ones, then far ones."""


@dataclass(frozen=True)
class LSTMConfig:
    """Sizes of the LSTM policy; the papers print none, so defaults are the GCN's embedding, hidden.

    ``hidden`` is the state's size in each of the two directions.
    """

    embedding: int = 100
    hidden: int = 100


class LSTMLogits(nn.Module):
    """An LSTM that reads a cell's edges in order and gives each edge its K logits.

    An edge's token is the sum of embeddings of its primitive, its two nodes and the cell's type.
    Nodes are embedded by sines of their number, so cells of any size and in-degree can be read. It
    reads in both directions, so that every edge's logits see the whole cell, as with the GCN.
    Weights are drawn from ``generator``, or from one of seed 0. Source: NAT, Table 3 (LSTM).
    """

    def __init__(
        self, primitives: int, config: LSTMConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config, self.primitives = config, primitives
        with torch.device("meta"):
            self.edge = embedding(primitives, config.embedding)
            self.kind = embedding(2, config.embedding)
            self.place = nn.Linear(4 * len(WAVES), config.embedding, bias=False)
            self.lstm = nn.LSTM(
                config.embedding, config.hidden, batch_first=True, bidirectional=True
            )
            self.head = nn.Linear(2 * config.hidden, primitives)
        allocate(self, "cpu")
        _draw_weights(self, ("edge", "kind"), 3.0, generator)

    def forward(self, batch: CellBatch) -> Tensor:
        """Compute logits (B, N, D, K); those of padding mean nothing."""
        b, n, d = batch.primitives.shape
        target = torch.arange(INPUTS, INPUTS + n, device=batch.sources.device)
        ends = torch.stack([batch.sources, target[:, None].expand_as(batch.sources)], -1)
        angles = ends[..., None] / self.place.weight.new_tensor(WAVES)
        places = torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)
        tokens = self.edge(batch.primitives) + self.place(places)
        tokens = (tokens + self.kind(batch.reduction.long())[:, None, None]).flatten(1, 2)
        present = batch.present.flatten(1)
        # Padding may stand between edges; the LSTM must not see it: edges first, and back after.
        order = present.logical_not().long().argsort(dim=1, stable=True)
        rows = torch.arange(b, device=order.device)[:, None]
        packed = pack_padded_sequence(
            tokens[rows, order], present.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = pad_packed_sequence(self.lstm(packed)[0], True, total_length=n * d)
        logits: Tensor = self.head(states[rows, order.argsort(1)])
        return logits.view(b, n, d, -1)


def build_logits(
    primitives: int, config: GCNConfig | LSTMConfig, generator: torch.Generator | None = None
) -> GCNLogits | LSTMLogits:
    """Build the policy network that a configuration describes, over K ``primitives``."""
    if isinstance(config, LSTMConfig):
        return LSTMLogits(primitives, config, generator)
    return GCNLogits(primitives, config, generator)


class Policy:
    """A policy network with a transition rule: samples and scores rewritings of genotypes.

    ``logits`` maps a ``CellBatch`` to logits (B, N, D, K); K is the rule's search space. The
    rule's mask enters through BMSoftmax, so no forbidden transition has probability above 0.
    """

    def __init__(self, logits: Logits, transitions: Transitions, device: str = "cpu") -> None:
        self.logits, self.transitions = logits, transitions
        self.device = torch.device(device)
        self.mask = transitions.mask().to(self.device)

    def encode(self, genotypes: Sequence[Genotype]) -> CellBatch:
        """Encode genotypes for this policy's search space and device."""
        return CellBatch.encode(genotypes, self.transitions.primitives).to(self.device)

    def log_probabilities(self, batch: CellBatch) -> Tensor:
        """Log-probabilities (B, N, D, K) of every transition of every edge."""
        return bm_log_softmax(self.logits(batch), self.mask[batch.strides(), batch.primitives])

    def sample(
        self,
        genotypes: Sequence[Genotype],
        generator: torch.Generator,
        times: int = 1,
    ) -> Rollout:
        """Sample ``times`` rewritings of each genotype, side by side."""
        batch = self.encode(genotypes)
        logp = self.log_probabilities(batch)
        # Drawn on the CPU: the same numbers on every device.
        uniform = torch.rand(*logp.shape[:-1], times, generator=generator).to(logp.device)
        actions = draw(logp, uniform)
        # Sums over both cells' edges, (genotypes, times).
        keep = batch.present[..., None]
        both = (len(genotypes), -1, times)
        chosen = (logp.gather(-1, actions) * keep).view(both).sum(1)
        entropy = (entropy_terms(logp).sum(-1) * batch.present).view(len(genotypes), -1).sum(1)
        repeated = [g for g in genotypes for _ in range(times)]
        cells = actions.view(len(genotypes), 2, *actions.shape[1:]).movedim(-1, 1)
        return Rollout(
            decode(repeated, cells.flatten(0, 2), self.transitions.primitives),
            chosen.flatten(),
            entropy.repeat_interleave(times),
        )

    def most_likely(self, genotypes: Sequence[Genotype]) -> list[Genotype]:
        """Return the argmax rewriting of each genotype (the paper's Maximum-GCN)."""
        with torch.no_grad():
            actions = self.log_probabilities(self.encode(genotypes)).argmax(-1)
        return decode(genotypes, actions, self.transitions.primitives)
