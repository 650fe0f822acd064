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
