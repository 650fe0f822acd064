"""Published genotypes, each with its source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType

from natlib.errors import NatlibError
from natlib.genotype import Genotype


@cache
def _load() -> tuple[Mapping[str, Genotype], Mapping[str, str]]:
    raw = json.loads(resources.files("natlib").joinpath("zoo.json").read_text("utf-8"))
    genotypes = {name: Genotype.from_json(value) for name, value in raw.items()}
    return MappingProxyType(genotypes), MappingProxyType({n: v["source"] for n, v in raw.items()})


ZOO, SOURCES = _load()
"""All published genotypes by name, and where each was published."""


def get(name: str) -> Genotype:
    """Return the published genotype called ``name``; NatlibError lists the names if unknown."""
    try:
        return ZOO[name]
    except (KeyError, TypeError):
        raise NatlibError(f"unknown genotype {name!r}; allowed are {', '.join(ZOO)}") from None


REWRITINGS: tuple[tuple[str, str, str], ...] = tuple(
    (after.removeprefix(prefix).replace("MobileNetv2", "Mobilenetv2"), after, rule)
    for after in ZOO
    for prefix, rule in (("NAT_", "nat"), ("NATv2_", "natpp"))
    if after.startswith(prefix)
)
"""Published rewritings: name before, name after, and the rule (``transitions``) that it claims."""
