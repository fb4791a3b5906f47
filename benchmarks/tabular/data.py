"""Data sets, their locked test rows, and the folds on which configurations are chosen."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split

SPLIT_SEED = 0
FOLDS = 5
LARGEST, SMALLEST = 60, 3  # training rows of the first and of the last digit


@dataclass(frozen=True)
class Part:
    """Training rows and the rows to predict, standardised by the training rows."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_eval: np.ndarray
    y_eval: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> "Part":
        """Choose the rows and standardise them."""
        mean, scale = x[train].mean(0), x[train].std(0)
        scaled = ((x - mean) / np.where(scale > 0, scale, 1)).astype(np.float32)
        return cls(scaled[train], y[train], scaled[test], y[test])

    def save(self, path: Path) -> None:
        """Write what a run may see; the labels to predict are not in it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, x_train=self.x_train, y_train=self.y_train, x_eval=self.x_eval)


def mammography() -> tuple[np.ndarray, np.ndarray]:
    """11,183 rows of 6 features, 260 positives; read from $XRISK_DATA, not part of the project."""
    folder = os.environ.get("XRISK_DATA")
    path = Path(folder or ".") / "tabular" / "mammography.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there; set XRISK_DATA to a folder that holds tabular/mammography.csv"
        )
    table = np.genfromtxt(path, delimiter=",", dtype=str)
    return table[:, :6].astype(np.float64), (table[:, 6] == "'1'").astype(np.int64)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 images of 8 x 8, ten classes; bundled with scikit-learn."""
    x, y = load_digits(return_X_y=True)
    return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.int64)


def halves(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows to develop on and locked test rows, half of each class."""
    return train_test_split(np.arange(len(y)), test_size=0.5, stratify=y, random_state=SPLIT_SEED)


def mammography_parts() -> dict[str, Part]:
    """Five folds of the first half for choosing, and the whole of it against the test half."""
    x, y = mammography()
    develop, test = halves(y)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SPLIT_SEED)
    parts = {
        f"fold-{k}": Part.of(x, y, develop[train], develop[held])
        for k, (train, held) in enumerate(folds.split(develop, y[develop]))
    }
    return parts | {"test": Part.of(x, y, develop, test)}


def digits_parts(count: int) -> dict[str, Part]:
    """Training rows that fall off from digit to digit; held-out rows and the test half do not.

    Each of ``count`` draws has other training rows, 60 of the first digit down to 3 of the last,
    and for choosing other held-out rows, 20 of each digit.
    """
    x, y = digits()
    develop, test = halves(y)
    sizes = np.geomspace(LARGEST, SMALLEST, 10).round().astype(int)
    parts = {}
    for k in range(FOLDS + count):
        rng = np.random.default_rng([SPLIT_SEED, k])
        classes = [rng.permutation(develop[y[develop] == digit]) for digit in range(10)]
        train = np.concatenate([c[:n] for c, n in zip(classes, sizes, strict=True)])
        held = np.concatenate([c[-20:] for c in classes])
        choosing = k < FOLDS
        name = f"fold-{k}" if choosing else f"test-{k - FOLDS}"
        parts[name] = Part.of(x, y, train, held if choosing else test)
    return parts
