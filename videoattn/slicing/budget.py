"""A number of bytes, as users write it."""

from __future__ import annotations

import re

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse(memory: int | str, where: str = "memory") -> int:
    """Bytes of 11 * 2**30, "11GiB", "11 GB", "1.5gib".

    >>> parse("11GiB"), parse("11 GB"), parse("0.5 kib")
    (11811160064, 11000000000, 512)

    Raises:
        TypeError: neither an int nor a str. ValueError: no such size, or nothing at all.
    """
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise TypeError(f"{where}: wanted a number of bytes or a str like '11GiB', got {type(memory).__name__}")
    if isinstance(memory, int):
        size = memory
    else:
        read = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", memory, re.IGNORECASE)
        if read is None:
            raise ValueError(f"{where}: wanted a size like '11GiB' or '11 GB', got {memory!r}")
        size = int(float(read[1]) * UNITS[(read[2] or "").upper()])
    if size < 1:
        raise ValueError(f"{where}: wanted 1 byte at least, got {memory!r}")
    return size


def shown(size: int) -> str:
    """A number of bytes for people.

    >>> shown(11811160064), shown(5 * 2**19), shown(700)
    ('11.00 GiB', '2.50 MiB', '700 bytes')
    """
    for unit in ("Gi", "Mi", "Ki"):
        if size >= UNITS[unit.upper()]:
            return f"{size / UNITS[unit.upper()]:.2f} {unit}B"
    return f"{size} bytes"
