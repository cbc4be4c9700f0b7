"""Mutations of bytes that know nothing of what they mean."""

from __future__ import annotations

from random import Random


def bytes_mutated(random: Random, data: bytes, head: int = 64) -> bytes:
    """Bits flipped, bytes overwritten, cut, doubled or lost; half of it in the first `head`."""
    kind = random.randrange(7)
    if kind == 0:
        return data[: random.randrange(len(data))]
    changed = bytearray(data)
    where = [_place(random, len(data), head) for _ in range(random.choice([1, 1, 1, 2, 4, 16]))]
    if kind <= 3:
        for at in where:
            changed[at] ^= 1 << random.randrange(8)
    elif kind == 4:
        for at in where:
            changed[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)])
    elif kind == 5:
        at, length = where[0], random.choice([1, 4, 8, 64, 1000])
        changed[at:at] = changed[at : at + length]
    else:
        at, length = where[0], random.choice([1, 4, 8, 64, 1000])
        del changed[at : at + length]
    return bytes(changed)


def _place(random: Random, length: int, head: int) -> int:
    return random.randrange(min(head, length) if random.random() < 0.5 else length)
