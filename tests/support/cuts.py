"""Bytes as a socket may bring them: cut anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise


def cut_at(raw: bytes, cuts: Iterable[int]) -> list[bytes]:
    """`raw` in pieces that end at each of `cuts`; one that stands twice gives an empty piece."""
    edges = [0, *sorted(min(at, len(raw)) for at in cuts), len(raw)]
    return [raw[start:end] for start, end in pairwise(edges)]
