"""Seeds of the run's random draws."""

import hashlib


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from several numbers, far from the seed of any neighbour."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
