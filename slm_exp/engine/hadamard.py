"""Orthonormal Hadamard matrices, by Sylvester's doubling of Paley's. Imports no torch."""

from __future__ import annotations

import numpy as np

from slm_exp.core.errors import ConfigError


def hadamard(n: int, remedy: str = "") -> np.ndarray:
    """[n, n] float64, entries +-1/sqrt(n), rows orthonormal. Raises ConfigError: none of this order is made here."""
    core = n
    while core > 2 and core % 2 == 0 and (core // 2) % 2 == 0 and _paley(core) is None:
        core //= 2
    small = np.ones((1, 1)) if core == 1 else np.array([[1.0, 1], [1, -1]]) if core == 2 else _paley(core)
    if small is None:
        raise ConfigError(f"hidden size = {n}; no Hadamard matrix of this order is made here. {remedy}".rstrip())
    while len(small) < n:
        small = np.block([[small, small], [small, -small]])
    return small / np.sqrt(n)


def _paley(n: int) -> np.ndarray | None:
    """Of order q + 1 for a prime q = 3 mod 4, or 2 (q + 1) for a prime q = 1 mod 4; None for other orders."""
    for q, second in ((n - 1, False), (n // 2 - 1, True)):
        if q < 3 or q % 4 != (1 if second else 3) or any(q % k == 0 for k in range(2, int(q**0.5) + 1)):
            continue
        squares = {i * i % q for i in range(1, q)}
        character = np.array([0, *(1 if i in squares else -1 for i in range(1, q))], dtype=float)
        i = np.arange(q)
        s = np.zeros((q + 1, q + 1))
        s[1:, 1:] = character[(i[:, None] - i) % q]
        s[0, 1:], s[1:, 0] = 1, 1 if second else -1
        if not second:
            return s + np.eye(q + 1)
        return np.kron(s, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    return None
