"""Searches that evaluate architectures one by one: random, hill climbing, exhaustive, and NAO.

Each takes a ``Closure`` (what may become of the input), an evaluator, a budget of evaluations and a
generator, and returns ``Found``, so that any two compare at equal numbers of evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, islice, product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natlib.allocation import allocate, embedding
from natlib.errors import NatlibError
from natlib.genotype import Genotype
from natlib.transitions import Transitions, edge_stride

Evaluate = Callable[[Sequence[Genotype]], list[float]]
"""Validation accuracies (0..1) of a batch of genotypes; larger is better."""

EXHAUSTIVE_LIMIT = 100_000
"""The most architectures that ``exhaustive`` looks at."""

# Draws without anything new after which a closure is enumerated or, if too large, given up.
_PATIENCE = 1000


def _anything(genotype: Genotype) -> bool:
    return True


def reachable(transitions: Transitions, primitive: str, strides: Iterable[int]) -> tuple[str, ...]:
    """Return what repeated allowed transitions make of a primitive, itself first.

    Every step must be allowed at all ``strides``. Raises NatlibError as ``Transitions.allows``.
    """
    strides = tuple(strides)
    found = [primitive]
    for source in found:  # grows while it is read
        found += [
            target
            for target in transitions.primitives
            if target not in found and all(transitions.allows(source, target, s) for s in strides)
        ]
    return (primitive, *sorted(found[1:], key=transitions.primitives.index))


@dataclass(frozen=True)
class Closure:
    """The genotypes a search may return: the input's graph, each choice one of its options.

    Choice i sets the edges ``groups[i]`` (positions in ``genotype.primitives``) to one of
    ``options[i]``, of which the first is the input's own. ``within`` says which of these
    genotypes may be evaluated, by their cost, say; the input always may.
    Raises NatlibError if groups and options differ in number, an edge is not in exactly one group,
    or a choice's first option is not what its edges carry.
    """

    genotype: Genotype
    groups: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, ...], ...]
    within: Callable[[Genotype], bool] = _anything

    def __post_init__(self) -> None:
        own = self.genotype.primitives
        if len(self.groups) != len(self.options):
            raise NatlibError(f"{len(self.options)} sets of options for {len(self.groups)} choices")
        if sorted(chain(*self.groups)) != list(range(len(own))):
            raise NatlibError(
                f"the groups {self.groups} must hold each of the edges 0..{len(own) - 1} once"
            )
        for group, options in zip(self.groups, self.options, strict=True):
            if carried := {own[i] for i in group} - set(options[:1]):
                raise NatlibError(
                    f"edges {group} carry {', '.join(sorted(carried))}, which is not the first of "
                    f"their options {options}"
                )

    @cached_property
    def size(self) -> int:
        """How many genotypes there are, those not ``within`` included."""
        return math.prod(len(options) for options in self.options)

    def build(self, code: Code) -> Genotype:
        """Return the genotype that takes option ``code[i]`` in each choice i."""
        names = list(self.genotype.primitives)
        for group, options, i in zip(self.groups, self.options, code, strict=True):
            for edge in group:
                names[edge] = options[i]
        return self.genotype.with_primitives(names)

    def codes(self) -> Iterator[Code]:
        """Yield the codes of all genotypes, the input's (all zeros) first."""
        return product(*(range(len(options)) for options in self.options))

    def draw(self, count: int, generator: torch.Generator) -> list[Code]:
        """Draw codes uniformly, with replacement."""
        columns = [
            torch.randint(len(options), (count,), generator=generator).tolist()
            for options in self.options
        ]
        return list(zip(*columns, strict=True))

    def neighbours(self, code: Code, generator: torch.Generator) -> list[Code]:
        """Return all codes that differ in one choice, in random order."""
        found = [
            (*code[:i], option, *code[i + 1 :])
            for i, options in enumerate(self.options)
            for option in range(len(options))
            if option != code[i]
        ]
        return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


Code = tuple[int, ...]
"""A genotype of a closure: the number of its option in each choice."""


def closure(
    genotype: Genotype,
    transitions: Transitions,
    tied: bool = False,
    within: Callable[[Genotype], bool] = _anything,
) -> Closure:
    """Return what repeated application of a rule's transitions can make of a genotype.

    A transition rewrites one edge, so this is the product of what is reachable on each edge at its
    stride. natlib's rules are transitive: one transition an edge, which is what a policy makes,
    reaches all of it; for a rule that is not, this is more than a policy reaches at once.
    ``transitions.free`` gives the whole space of the graph. ``tied``: normal and reduction cell
    carry the same primitives (as in natbench), and a transition must be allowed in both. Raises
    NatlibError if tied cells differ and on a primitive outside the rule's search space.
    """
    strides = [edge_stride(e.source, name) for name, cell in genotype.cells for e in cell.edges]
    groups: list[tuple[int, ...]] = [(i,) for i in range(len(strides))]
    if tied:
        if genotype.normal != genotype.reduce:
            raise NatlibError("normal and reduction cell differ, so their edges cannot be tied")
        half = len(strides) // 2
        groups = [(i, half + i) for i in range(half)]
    names = genotype.primitives
    options = [reachable(transitions, names[g[0]], [strides[i] for i in g]) for g in groups]
    return Closure(genotype, tuple(groups), tuple(options), within)


@dataclass(frozen=True)
class Found:
    """What a search evaluated: ``trajectory`` holds each distinct genotype and its value, in order.

    The input stands first.
    """

    trajectory: tuple[tuple[Genotype, float], ...]

    @cached_property
    def best(self) -> tuple[Genotype, float]:
        """The genotype of highest value, the earliest of equals, and its value."""
        return max(self.trajectory, key=lambda pair: pair[1])

    @property
    def genotype(self) -> Genotype:
        """The best genotype."""
        return self.best[0]

    @property
    def value(self) -> float:
        """The best genotype's value."""
        return self.best[1]

    @property
    def best_so_far(self) -> list[float]:
        """The highest value after 1, 2, ... evaluations."""
        return list(accumulate((value for _, value in self.trajectory), max))


class _Ledger:
    """What one search evaluated and may still evaluate; a code is charged once."""

    def __init__(self, closure: Closure, evaluate: Evaluate, budget: int) -> None:
        if budget < 1:
            raise NatlibError(f"budget = {budget} evaluations; the input itself takes 1")
        self.closure, self.evaluate, self.budget = closure, evaluate, budget
        self.values: dict[Code, float] = {}
        self.trajectory: list[tuple[Genotype, float]] = []
        self.refused: set[Code] = set()
        self.start: Code = (0,) * len(closure.options)
        self._evaluate({self.start: closure.genotype})

    @property
    def left(self) -> int:
        """How many evaluations are left: of the budget, or of the closure."""
        unseen = self.closure.size - len(self.values) - len(self.refused)
        return min(self.budget - len(self.values), unseen)

    def fresh(self, codes: Iterable[Code]) -> Iterator[tuple[Code, Genotype]]:
        """Yield the codes that may be evaluated and are not yet, each once."""
        for code in dict.fromkeys(codes):
            if code not in self.values and code not in self.refused:
                genotype = self.closure.build(code)
                if self.closure.within(genotype):
                    yield code, genotype
                else:
                    self.refused.add(code)

    def ask(self, codes: Iterable[Code]) -> None:
        """Evaluate the codes that are new, in one batch; what exceeds the budget is left out."""
        self._evaluate(dict(islice(self.fresh(codes), self.budget - len(self.values))))

    def draw(self, count: int, generator: torch.Generator) -> list[Code]:
        """Draw up to ``count`` codes that ``ask`` would evaluate, uniformly, without replacement.

        Fewer where there are no more, or where many draws from a large closure met no other.
        """
        count = min(count, self.left)
        found: dict[Code, None] = {}
        idle = 0
        while len(found) < count and idle < _PATIENCE:
            before = len(found)
            drawn = self.closure.draw(max(count, 64), generator)
            found |= dict.fromkeys(code for code, _ in self.fresh(drawn))
            idle = 0 if len(found) > before else idle + len(drawn)
        if len(found) < count and self.closure.size <= EXHAUSTIVE_LIMIT:
            rest = [code for code, _ in self.fresh(self.closure.codes()) if code not in found]
            order = torch.randperm(len(rest), generator=generator).tolist()
            found |= dict.fromkeys(rest[i] for i in order)
        return list(found)[:count]

    def _evaluate(self, new: dict[Code, Genotype]) -> None:
        if not new:
            return
        values = self.evaluate(list(new.values()))
        if len(values) != len(new) or not all(map(math.isfinite, values)):
            raise NatlibError(
                f"the evaluator must return one finite value for each of {len(new)} genotypes, got "
                f"{values}"
            )
        self.values |= zip(new, values, strict=True)
        self.trajectory += zip(new.values(), values, strict=True)

    def found(self) -> Found:
        return Found(tuple(self.trajectory))


def exhaustive(closure: Closure, evaluate: Evaluate, limit: int = EXHAUSTIVE_LIMIT) -> Found:
    """Evaluate every genotype of a closure, in one batch.

    Raises NatlibError if there are more than ``limit``.
    """
    if closure.size > limit:
        raise NatlibError(
            f"the closure has {closure.size} genotypes; exhaustive search looks at {limit} at most"
        )
    ledger = _Ledger(closure, evaluate, closure.size)
    ledger.ask(closure.codes())
    return ledger.found()


def random_search(
    closure: Closure, evaluate: Evaluate, budget: int, generator: torch.Generator
) -> Found:
    """Evaluate the input and uniformly drawn other genotypes of the closure, in one batch."""
    ledger = _Ledger(closure, evaluate, budget)
    ledger.ask(ledger.draw(ledger.left, generator))
    return ledger.found()


def hill_climbing(
    closure: Closure,
    evaluate: Evaluate,
    budget: int,
    generator: torch.Generator,
    batch: int = 1,
) -> Found:
    """Climb from the input by single changes that raise the value; restart at random when on top.

    Neighbours differ in one choice and are looked at in random order, ``batch`` at a time; the best
    of a batch is taken if it is better than where the search stands. 1 is first improvement; a
    batch that holds all neighbours is steepest ascent. Any option of the closure may follow any
    other, since what counts is that the result is a rewriting of the input. A restart begins at a
    genotype not evaluated yet. Raises NatlibError unless batch and budget are positive.
    """
    if batch < 1:
        raise NatlibError(f"batch = {batch}; allowed is 1 or more")
    ledger = _Ledger(closure, evaluate, budget)
    here, values = ledger.start, ledger.values
    while ledger.left:
        around = closure.neighbours(here, generator)
        for start in range(0, len(around), batch):
            ledger.ask(part := around[start : start + batch])
            best = max(part, key=lambda code: values.get(code, -math.inf))
            if values.get(best, -math.inf) > values[here]:
                here = best
                break
        else:
            if not (fresh := ledger.draw(1, generator)):
                break
            ledger.ask(fresh)
            here = fresh[0]
    return ledger.found()


# NAO ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NAOConfig:
    """Sizes and training of NAO; defaults are small, so that hundreds of searches take minutes.

    Sizes of token ``embedding``, ``hidden`` states and the ``predictor``'s layer. ``trade_off``
    weighs the predictor's squared error, the rest the decoder's log-loss; each round Adam makes
    ``updates`` with ``batch`` architectures. A share ``first`` of the budget goes to random
    architectures, the rest to ``rounds`` of proposals, made by gradient ``steps`` of several sizes
    from the ``seeds`` best.

    Published: embedding 48, hidden 96, predictor 200 in three layers with dropout 0.1, trade-off
    0.8, 1000 epochs of batches of 100, lr 0.001, weight decay 1e-4, clip 5, steps from 1000
    architectures to 300 new and 100 random ones a round. Source: Luo et al. (NeurIPS 2018) and the
    settings of the authors' PyTorch code for CIFAR-10 (weight sharing).
    """

    embedding: int = 16
    hidden: int = 32
    predictor: int = 64
    trade_off: float = 0.8
    updates: int = 60
    batch: int = 100
    lr: float = 0.01
    weight_decay: float = 1e-4
    clip: float = 5.0
    first: float = 0.5
    rounds: int = 3
    seeds: int = 10
    steps: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)

    def __post_init__(self) -> None:
        if not 0 <= self.first <= 1:
            raise NatlibError(f"first = {self.first}; allowed is a share of the budget, 0..1")
        for name in ("rounds", "seeds", "updates", "batch"):
            if getattr(self, name) < 1:
                raise NatlibError(f"{name} = {getattr(self, name)}; allowed is 1 or more")


class NAO(nn.Module):
    """Encoder, performance predictor and decoder over architectures as sequences of tokens.

    A token is the primitive of one choice of a fixed graph, one of ``vocabulary``, so whatever is
    decoded is an architecture. The embedding of one is a unit vector for each token (B, T, H).
    Weights are drawn from ``generator``, or from one of seed 0. Source: Luo et al. (NeurIPS 2018),
    Sec. 3; there sources are tokens too, here a rewriting keeps the input's graph.
    """

    def __init__(
        self, vocabulary: int, config: NAOConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        h = config.hidden
        with torch.device("meta"):
            # The last one starts what is decoded.
            self.token = embedding(vocabulary + 1, config.embedding)
            self.encoder = nn.LSTM(config.embedding, h, batch_first=True)
            self.predictor = nn.Sequential(
                nn.Linear(h, config.predictor), nn.ReLU(), nn.Linear(config.predictor, 1)
            )
            self.decoder = nn.LSTM(config.embedding, h, batch_first=True)
            self.mix = nn.Linear(2 * h, h)
            self.head = nn.Linear(h, vocabulary)
        allocate(self, "cpu")
        generator = generator or torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.parameters():
                if weight.ndim > 1:
                    bound = math.sqrt(3 / weight.shape[1])
                    weight.uniform_(-bound, bound, generator=generator)
                else:
                    weight.zero_()

    def encode(self, tokens: Tensor) -> Tensor:
        """Embed architectures (B, T): (B, T, H), each token's vector of length 1."""
        return F.normalize(self.encoder(self.token(tokens))[0], dim=-1)

    def predict(self, embedding: Tensor) -> Tensor:
        """Predict performance (B,), in standard deviations of the accuracies it was fitted to."""
        predicted: Tensor = self.predictor(F.normalize(embedding.mean(1), dim=-1))[:, 0]
        return predicted

    def decode(self, embedding: Tensor, tokens: Tensor) -> Tensor:
        """Compute the logits (B, T, vocabulary) of each token, given those before it."""
        start = torch.full_like(tokens[:, :1], self.vocabulary)
        before = torch.cat([start, tokens[:, :-1]], 1)
        return self._decode(embedding, before, self._state(embedding))[0]

    def generate(self, embedding: Tensor, allowed: Tensor) -> Tensor:
        """Decode to the likeliest tokens (B, T) one by one.

        Only what ``allowed`` (bool, broadcastable to (B, T, vocabulary)) permits is taken.
        """
        state = self._state(embedding)
        allowed = allowed.expand(len(embedding), -1, -1)
        token = torch.full((len(embedding), 1), self.vocabulary, device=embedding.device)
        found = []
        for t in range(allowed.shape[1]):
            logits, state = self._decode(embedding, token, state)
            token = logits[:, 0].masked_fill(~allowed[:, t], -math.inf).argmax(1, keepdim=True)
            found.append(token)
        return torch.cat(found, 1)

    def step(self, embedding: Tensor, size: float) -> Tensor:
        """Move embeddings uphill the predicted performance: each token by ``size``, then back to 1.

        Source: Luo et al. (2018), Sec. 3.3; here the gradient is scaled to length 1, so that sizes
        mean the same however steep the predictor is.
        """
        start = embedding.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.predict(start).sum(), start)
        return F.normalize(start.detach() + size * F.normalize(gradient, dim=-1), dim=-1)

    @torch.no_grad()
    def improve(self, tokens: Tensor, allowed: Tensor, size: float) -> Tensor:
        """Rewrite architectures (B, T) by one gradient step in the embedding; see ``generate``."""
        return self.generate(self.step(self.encode(tokens), size), allowed)

    def fit(self, tokens: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Train all three parts jointly on evaluated architectures (n, T) and accuracies (n,)."""
        config = self.config
        target = (values - values.mean()) / values.std(correction=0).clamp(min=1e-8)
        optimizer = torch.optim.Adam(
            self.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        for _ in range(config.updates):
            chosen = torch.randperm(len(tokens), generator=generator)[: config.batch]
            batch = tokens[chosen]
            embedding = self.encode(batch)
            error = F.mse_loss(self.predict(embedding), target[chosen])
            logits = self.decode(embedding, batch)
            unlike = F.cross_entropy(logits.flatten(0, 1), batch.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss = config.trade_off * error + (1 - config.trade_off) * unlike
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.parameters(), config.clip)
            optimizer.step()

    def _state(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's first state: the architecture's mean embedding."""
        mean = F.normalize(embedding.mean(1), dim=-1)[None]
        return mean, mean

    def _decode(
        self, embedding: Tensor, before: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, state = self.decoder(self.token(before), state)
        attention = torch.bmm(out, embedding.transpose(1, 2)).softmax(-1)
        seen = torch.cat([out, torch.bmm(attention, embedding)], -1)
        return self.head(self.mix(seen).tanh()), state


def nao(
    closure: Closure,
    evaluate: Evaluate,
    budget: int,
    generator: torch.Generator,
    config: NAOConfig | None = None,
) -> Found:
    """Neural architecture optimization: learn an embedding, climb in it, evaluate what is decoded.

    After random architectures of the closure, each round fits ``NAO`` to all that is evaluated,
    steps from the input and the best, and evaluates the new architectures of highest predicted
    performance; what then is left of a round's share goes to random ones. As the NAT paper uses it,
    it starts at an input and may return a dearer architecture: ``transitions.free``. Source: Luo et
    al. (NeurIPS 2018), Sec. 3.3. Raises NatlibError if the budget is not positive.
    """
    config = config or NAOConfig()
    ledger = _Ledger(closure, evaluate, budget)
    names = tuple(dict.fromkeys(chain(*closure.options)))
    numbers = [[names.index(option) for option in options] for options in closure.options]
    allowed = torch.zeros(len(numbers), len(names), dtype=torch.bool)
    for choice, options in zip(allowed, numbers, strict=True):
        choice[options] = True
    model = NAO(len(names), config, generator)

    def tokens(codes: Iterable[Code]) -> Tensor:
        return torch.tensor([[o[i] for o, i in zip(numbers, c, strict=True)] for c in codes])

    ledger.ask(ledger.draw(round(config.first * budget) - 1, generator))
    for left in range(config.rounds, 0, -1):
        if not ledger.left:
            break
        share = -(-ledger.left // left)
        model.fit(tokens(ledger.values), torch.tensor([*ledger.values.values()]), generator)
        ranked = sorted(ledger.values, key=ledger.values.__getitem__, reverse=True)
        seeds = tokens(dict.fromkeys([*ranked[: config.seeds], ledger.start]))
        rewritten = torch.cat([model.improve(seeds, allowed, size) for size in config.steps])
        with torch.no_grad():
            order = model.predict(model.encode(rewritten)).argsort(descending=True)
        proposed = [
            tuple(o.index(token) for o, token in zip(numbers, row, strict=True))
            for row in rewritten[order].tolist()
        ]
        before = len(ledger.values)
        ledger.ask([code for code, _ in islice(ledger.fresh(proposed), share)])
        ledger.ask(ledger.draw(share - (len(ledger.values) - before), generator))
    return ledger.found()
