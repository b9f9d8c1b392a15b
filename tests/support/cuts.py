"""Cuts bytes into pieces, as they may come from a socket."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise


def cut_at(raw: bytes, cuts: Iterable[int]) -> list[bytes]:
    """Return `raw` in pieces that end at each of `cuts`; a cut given twice makes an empty piece."""
    edges = [0, *sorted(min(at, len(raw)) for at in cuts), len(raw)]
    return [raw[start:end] for start, end in pairwise(edges)]
