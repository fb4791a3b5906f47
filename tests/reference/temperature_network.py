"""The temperature network of CLIP-TempNet, (6.50), and its gradient, number by number."""

import math
from dataclasses import dataclass

from tests.reference.embeddings import Vector, dot

Gradient = dict[str, list[float]]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def hashed(number: int) -> int:
    """A well-known mixer of 32-bit integers."""
    for _ in range(2):
        number = (((number >> 16) ^ number) * 0x45D9F3B) % 2**32
    return (number >> 16) ^ number


@dataclass
class Network:
    """Weights of one modality's network, and the number of the step."""

    weight: list[Vector]
    bias: Vector
    prototypes: list[Vector]
    scaler: float
    pool: Vector
    offset: float
    bounds: tuple[float, float]
    dropout: float
    seed: int
    steps: int = 0

    def start(self, partners: list[Vector], sample: list[int]) -> None:
        """Prototypes: the directions of samples' mean features, evenly spread by id."""
        directions = []
        for i in sorted(set(sample)):
            rows = [
                [x / math.sqrt(dot(v, v)) for x in v]
                for v, j in zip(partners, sample, strict=True)
                if i == j
            ]
            total = [sum(column) for column in zip(*rows, strict=True)]
            directions.append([x / math.sqrt(dot(total, total)) for x in total])
        found, wanted = len(directions), len(self.prototypes)
        for m in range(min(found, wanted)):
            self.prototypes[m] = directions[m * max(found, wanted) // wanted]

    def kept(self, sample: int) -> Vector:
        """1 / (1 - dropout) for the hidden units that stay, 0 for the others."""
        row = hashed((hashed((hashed(self.seed) + self.steps) % 2**32) + sample) % 2**32)
        stay = [
            hashed((row + hashed(k)) % 2**32) >= self.dropout * 2**32 for k in range(len(self.bias))
        ]
        return [int(s) / (1 - self.dropout) for s in stay]

    def predict(self, features: Vector, sample: int) -> tuple[float, Gradient]:
        """tau, and its gradient in all weights."""
        length = math.sqrt(dot(features, features))
        x = [value / length for value in features]
        kept = self.kept(sample)
        hidden = [sigmoid(dot(w, x) + v) for w, v in zip(self.weight, self.bias, strict=True)]
        units = [h * k for h, k in zip(hidden, kept, strict=True)]
        size = [math.sqrt(dot(c, c)) for c in self.prototypes]
        unit = [[value / s for value in c] for c, s in zip(self.prototypes, size, strict=True)]
        q = [dot(units, n) for n in unit]
        sharp = math.exp(self.scaler)
        values = [math.exp(value / sharp - max(q) / sharp) for value in q]
        p = [value / sum(values) for value in values]
        many, gate = range(len(q)), [sigmoid(value) for value in q]
        pooled = [(p[m] - 1 / len(q)) * gate[m] for m in many]
        share = sigmoid(dot(self.pool, pooled) + self.offset)
        low, high = self.bounds
        slope = (high - low) * share * (1 - share)
        mean = sum(p[m] * self.pool[m] * gate[m] for m in many)
        by_softmax = [p[m] * (self.pool[m] * gate[m] - mean) for m in many]
        by_q = [
            slope
            * (self.pool[m] * (p[m] - 1 / len(q)) * gate[m] * (1 - gate[m]) + by_softmax[m] / sharp)
            for m in many
        ]
        by_hidden = [
            sum(by_q[m] * unit[m][k] for m in many) * kept[k] * hidden[k] * (1 - hidden[k])
            for k in range(len(hidden))
        ]
        gradient = {
            "weight": [g * value for g in by_hidden for value in x],
            "bias": by_hidden,
            "prototypes": [
                by_q[m] * (units[k] - q[m] * unit[m][k]) / size[m]
                for m in many
                for k in range(len(units))
            ],
            "scaler": [-slope * sum(by_softmax[m] * q[m] / sharp for m in many)],
            "pool": [slope * value for value in pooled],
            "offset": [slope],
        }
        return low + (high - low) * share, gradient
