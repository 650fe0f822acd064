"""natlib: a reference reproduction of NAT (NeurIPS 2019) and NAT++ (TPAMI 2021)."""

from natlib.errors import NatlibError

__all__ = ["NatlibError"]
__version__ = "0.1.0"
