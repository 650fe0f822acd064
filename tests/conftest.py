"""One hypothesis profile for all tests: the same examples on every machine, no time limits."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("natlib", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("natlib")
