"""Cosine similarities of vectors and their gradients, pair by pair."""

import math

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    """Inner product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


class Embeddings:
    """Vectors with the gradient that was pushed into them so far."""

    def __init__(self, vectors: list[Vector]) -> None:
        self.length = [math.sqrt(dot(v, v)) for v in vectors]
        self.h = [[x / n for x in v] for v, n in zip(vectors, self.length, strict=True)]
        self.gradient = [[0.0 for _ in v] for v in vectors]

    def similarity(self, i: int, j: int) -> float:
        """Cosine of vectors i and j."""
        return dot(self.h[i], self.h[j])

    def push(self, i: int, j: int, weight: float) -> None:
        """Add ``weight`` times the gradient of the cosine of i and j in the unscaled vectors."""
        similarity = self.similarity(i, j)
        for a, b in ((i, j), (j, i)):
            for k, value in enumerate(self.h[b]):
                self.gradient[a][k] += weight * (value - similarity * self.h[a][k]) / self.length[a]
