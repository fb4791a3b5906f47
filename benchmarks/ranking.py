"""Learning to rank: our objectives, ListNet, ApproxNDCG and LightGBM's lambdarank, equal budgets.

    OMP_NUM_THREADS=1 XRISK_DATA=DIR python benchmarks/ranking.py [--methods TEXT ...]

LightGBM's example set ($XRISK_DATA/lambdarank: 201 training queries, 3,005 documents, 300 features;
50 test queries, locked). One MLP with 64 hidden units for all neural losses, Adam, 30 epochs of
batches of 16 queries, of whole lists or of at most 3 relevant and 1 irrelevant rows of each. Every
method has 4 learning rates x 2 settings of its own x 4 points to stop at (GRID) and takes the best
mean NDCG@10 over 5 folds of the training queries; the choice trains on all of them, once for each
of 10 seeds. NDCG@10 is sklearn.metrics.ndcg_score of the gains 2^y - 1. Differences are paired by
query and seed, with 95 % bootstrap intervals. Finished runs are kept, so a stopped benchmark goes
on. About 13 minutes on one core.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llm_xrisk.evaluation.bootstrap import Bootstrap  # noqa: E402
from llm_xrisk.objectives.listwise_cross_entropy import ListwiseCrossEntropy  # noqa: E402
from llm_xrisk.objectives.ndcg import NDCG, ranking_statistics  # noqa: E402
from llm_xrisk.objectives.ndcg_top_k import TopKNDCG  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "ranking-cpu.json"
PACKAGES = ("torch", "numpy", "scikit-learn", "lightgbm")
K, HIDDEN, EPOCHS, QUERIES, FOLDS, SEEDS = 10, 64, 30, 16, 5, 10
RELEVANT, IRRELEVANT = 3, 1  # rows of each list in the regime of sampled lists
STOPS = (3, 7, 15, 30)  # epochs
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
GAMMAS = ({"gamma": 0.3}, {"gamma": 0.9})
TREES: dict[str, Any] = {
    "rates": (0.02, 0.05, 0.1, 0.2),
    "settings": ({"num_leaves": 7}, {"num_leaves": 31}),
    "stops": (25, 50, 100, 200),
}
GRID: dict[str, tuple[dict[str, Any], ...]] = {
    "NDCG": GAMMAS,
    "NDCG, warmed up": GAMMAS,
    "TopKNDCG": GAMMAS,
    "TopKNDCG, warmed up": GAMMAS,
    "TopKNDCG, theoretical": GAMMAS,
    "TopKNDCG, product": GAMMAS,
    "ListwiseCrossEntropy": GAMMAS,
    "ListNet": ({"target": "softmax"}, {"target": "gain"}),
    "ApproxNDCG": ({"temperature": 0.1}, {"temperature": 1.0}),
    "LightGBM lambdarank": TREES["settings"],
}
REGIMES = {
    "whole lists": tuple(GRID),
    "sampled lists": (
        "NDCG",
        "NDCG, warmed up",
        "TopKNDCG",
        "ListwiseCrossEntropy",
        "ListNet",
        "ApproxNDCG",
    ),
}
BASELINES = ("ListNet", "ApproxNDCG", "LightGBM lambdarank")
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Lists:
    """Features, relevance and, in order, queries of documents."""

    features: Tensor
    relevance: Tensor
    query: Tensor

    def only(self, queries: Tensor) -> "Lists":
        """The lists of some queries, numbered anew."""
        keep = torch.isin(self.query, queries)
        number = torch.searchsorted(queries.sort().values, self.query[keep])
        return Lists(self.features[keep], self.relevance[keep], number)

    @property
    def sizes(self) -> list[int]:
        return self.query.bincount().tolist()


@dataclass(frozen=True)
class Run:
    """What determines a run; fold -1 is all training queries, to be tested."""

    regime: str
    method: str
    rate: float
    setting: dict[str, Any]
    fold: int
    seed: int

    @property
    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def read(folder: Path, part: str) -> Lists:
    """The lists in LibSVM's format, relevance first, and the sizes of the lists."""
    lines = (folder / f"rank.{part}").read_text().splitlines()
    features = torch.zeros(len(lines), 301)
    for row, line in enumerate(lines):
        for pair in line.split()[1:]:
            column, value = pair.split(":")
            features[row, int(column)] = float(value)
    relevance = torch.tensor([int(float(line.split()[0])) for line in lines])
    sizes = torch.tensor([int(x) for x in (folder / f"rank.{part}.query").read_text().split()])
    return Lists(features, relevance, torch.arange(len(sizes)).repeat_interleave(sizes))


def ndcg(scores: Tensor, lists: Lists) -> np.ndarray:
    """NDCG@10 of each query that has a relevant document, gains 2^y - 1; NaN for the others."""
    from sklearn.metrics import ndcg_score

    found, start = [], 0
    for size in lists.sizes:
        gain = 2.0 ** lists.relevance[start : start + size].numpy() - 1
        own = scores[start : start + size].numpy()
        # of one document sklearn has no ranking: it is perfect
        score = 1.0 if size == 1 else ndcg_score(gain[None], own[None], k=K)
        found.append(score if gain.any() else np.nan)
        start += size
    return np.array(found)


def approx_ndcg(scores: Tensor, relevance: Tensor, sizes: list[int], temperature: float) -> Tensor:
    """Qin et al. 2010: the rank of i is 1 + sum_{j != i} sigmoid((s_j - s_i) / temperature)."""
    s = pad_sequence(scores.split(sizes), batch_first=True)
    y = pad_sequence(relevance.split(sizes), batch_first=True)
    real = pad_sequence(torch.ones_like(scores).split(sizes), batch_first=True)
    ahead = torch.sigmoid((s[:, None, :] - s[:, :, None]) / temperature) * real[:, None, :]
    rank = 0.5 + ahead.sum(-1)  # the pair of i with itself is 0.5 of it
    gain = torch.exp2(y) - 1
    place = torch.arange(s.shape[1])
    ideal = (gain.sort(-1, descending=True).values / torch.log2(2.0 + place)).sum(-1)
    whole = (gain / torch.log2(1 + rank)).sum(-1) / ideal.clamp(min=1)
    return -whole[ideal > 0].sum() / (ideal > 0).sum().clamp(min=1)


def list_net(scores: Tensor, relevance: Tensor, sizes: list[int], target: str) -> Tensor:
    """Cao et al. 2007, top one: cross-entropy to the softmax of grades, or to shares of gain."""
    low = torch.finfo(scores.dtype).min
    s = pad_sequence(scores.split(sizes), batch_first=True, padding_value=low)
    y = pad_sequence(relevance.float().split(sizes), batch_first=True, padding_value=-torch.inf)
    gain = torch.exp2(y.clamp(min=0)) - 1
    share = gain / gain.sum(-1, keepdim=True).clamp(min=1)
    return F.cross_entropy(s, y.softmax(-1) if target == "softmax" else share)


def loss_of(run: Run, lists: Lists) -> Loss:
    """The loss of rows by (scores, relevance, index, query, progress); rows in order of lists."""
    count, setting = len(lists.query), run.setting
    if run.method == "ApproxNDCG":
        return lambda s, y, i, q, p: approx_ndcg(s, y, runs_of(q), setting["temperature"])
    if run.method == "ListNet":
        return lambda s, y, i, q, p: list_net(s, y, runs_of(q), setting["target"])
    whole = ranking_statistics(lists.relevance, lists.query)
    top = ranking_statistics(lists.relevance, lists.query, top_k=K)
    gamma = setting["gamma"]
    warm_up = ListwiseCrossEntropy(count, *whole[:2], gamma=gamma)
    name, _, variant = run.method.partition(", ")
    options: dict[str, Any] = {
        "theoretical": {"gradient": "theoretical"},
        "product": {"approach": "product"},
    }.get(variant, {})
    objective = {
        "NDCG": lambda: NDCG(count, *whole, gamma=gamma),
        "TopKNDCG": lambda: TopKNDCG(count, *top, gamma=gamma, top_k=K, **options),
        "ListwiseCrossEntropy": lambda: warm_up,
    }[name]()
    warm = 0.25 if variant == "warmed up" else 0.0  # of the epochs, as section 6.4.4 advises

    def loss(s: Tensor, y: Tensor, i: Tensor, q: Tensor, progress: float) -> Tensor:
        used = warm_up if progress < warm else objective
        return used(s, y, index=i, query=q).loss

    return loss


def runs_of(query: Tensor) -> list[int]:
    """Sizes of the lists of a batch whose rows stand list by list."""
    return query.unique_consecutive(return_counts=True)[1].tolist()


def batches(lists: Lists, sampled: bool, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of one epoch's batches, list by list."""
    kind = 2 * lists.query + (lists.relevance > 0)
    order = torch.randperm(len(kind), generator=generator)
    order = order[kind[order].argsort(stable=True)]
    count = kind.bincount(minlength=2 * len(lists.sizes))
    place = torch.arange(len(order)) - (count.cumsum(0) - count)[kind[order]]
    most = torch.where(kind[order] % 2 == 1, RELEVANT, IRRELEVANT)
    kept = order[place < most] if sampled else order
    for queries in torch.randperm(len(lists.sizes), generator=generator).split(QUERIES):
        yield kept[torch.isin(lists.query[kept], queries)]


def train(run: Run, lists: Lists, others: Lists) -> list[Tensor]:
    """Scores of the other lists at each stop."""
    torch.manual_seed(run.seed)
    width = lists.features.shape[1]
    model = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=run.rate)
    loss, generator = loss_of(run, lists), torch.Generator().manual_seed(run.seed)
    found = []
    for epoch in range(EPOCHS):
        for rows in batches(lists, run.regime == "sampled lists", generator):
            optimizer.zero_grad()
            scores = model(lists.features[rows]).squeeze(-1)
            query, relevance = lists.query[rows], lists.relevance[rows]
            loss(scores, relevance, rows, query, epoch / EPOCHS).backward()
            optimizer.step()
        if epoch + 1 in STOPS:
            with torch.no_grad():
                found.append(model(others.features).squeeze(-1))
    return found


def boost(run: Run, lists: Lists, others: Lists) -> list[Tensor]:
    """Scores of the other lists after each number of trees."""
    import lightgbm

    parameters = {
        "objective": "lambdarank",
        "learning_rate": run.rate,
        "bagging_fraction": 0.9,  # as in LightGBM's own example
        "bagging_freq": 1,
        "feature_fraction": 0.9,
        "min_data_in_leaf": 20,
        "num_threads": 1,
        "verbosity": -1,
        "seed": run.seed,
        **run.setting,
    }
    data = lightgbm.Dataset(lists.features.numpy(), lists.relevance.numpy(), group=lists.sizes)
    booster = lightgbm.train(parameters, data, num_boost_round=TREES["stops"][-1])
    features = others.features.numpy()
    return [torch.tensor(booster.predict(features, num_iteration=n)) for n in TREES["stops"]]


class Bench:
    """Runs what is missing, keeps what is done: NDCG@10 of each query at each stop."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.lists, self.test = read(data, "train"), read(data, "test")
        order = torch.randperm(len(self.lists.sizes), generator=torch.Generator().manual_seed(0))
        self.folds = [fold.sort().values for fold in order.tensor_split(FOLDS)]
        self.path, self.done = folder / "runs.jsonl", dict[str, dict[str, Any]]()
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for line in lines:
            # the last line of a benchmark that was killed may be half written
            if line.endswith("}"):
                entry = json.loads(line)
                self.done[entry["key"]] = entry

    def values(self, run: Run) -> np.ndarray:
        """(stops, queries) NDCG@10, of the fold's queries or of the test's."""
        if run.key not in self.done:
            started = time.perf_counter()
            lists, others = self.lists, self.test
            if run.fold >= 0:
                rest = [fold for i, fold in enumerate(self.folds) if i != run.fold]
                lists = self.lists.only(torch.cat(rest))
                others = self.lists.only(self.folds[run.fold])
            scores = (boost if run.method.startswith("LightGBM") else train)(run, lists, others)
            entry = {
                "key": run.key,
                **asdict(run),
                "seconds": time.perf_counter() - started,
                "ndcg": [ndcg(s, others).tolist() for s in scores],
            }
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self.done[run.key] = entry
        return np.array(self.done[run.key]["ndcg"], dtype=float)

    def choose(self, regime: str, method: str) -> tuple[float, dict[str, Any], int, float]:
        """Learning rate, setting, stop and validation NDCG@10 of the best of the grid."""
        trees = method.startswith("LightGBM")
        best: tuple[float, dict[str, Any], int, float] = (0.0, {}, 0, -1.0)
        for rate in TREES["rates"] if trees else RATES:
            for setting in GRID[method]:
                runs = [Run(regime, method, rate, setting, fold, 0) for fold in range(FOLDS)]
                means = np.nanmean(np.concatenate([self.values(r) for r in runs], axis=1), axis=1)
                stop = int(means.argmax())
                if means[stop] > best[3]:
                    best = (rate, setting, stop, float(means[stop]))
        return best

    def tested(self, regime: str, method: str) -> tuple[np.ndarray, dict[str, Any]]:
        """(seeds, test queries) NDCG@10 of the choice, and the choice."""
        rate, setting, stop, validation = self.choose(regime, method)
        runs = [Run(regime, method, rate, setting, -1, seed) for seed in range(SEEDS)]
        values = np.stack([self.values(run)[stop] for run in runs])
        stops = TREES["stops"] if method.startswith("LightGBM") else STOPS
        facts = {"rate": rate, **setting, "stop": stops[stop], "validation": validation}
        seconds = float(np.median([self.done[run.key]["seconds"] for run in runs]))
        return values, facts | {"seconds": seconds}


def report(regime: str, found: dict[str, tuple[np.ndarray, dict[str, Any]]]) -> dict[str, Any]:
    """Means with intervals, and paired differences to the baselines that were run; printed."""
    rows: dict[str, Any] = {}
    print(f"\n{regime}: test NDCG@{K}, {SEEDS} seeds, minus each baseline")
    for name, (values, facts) in found.items():
        boot = Bootstrap(values.shape[1])
        row: dict[str, Any] = {"chosen": facts, "ndcg@10": asdict(boot.interval(values))}
        row["seed_sd"] = float(values.mean(1).std(ddof=1))
        row["minus"] = {
            other: asdict(boot.interval(values - found[other][0]))
            for other in BASELINES
            if other in found and other != name
        }
        rows[name] = row
        gaps = "   ".join(
            f"{other.split()[0]} {d['estimate']:+.4f} [{d['lower']:+.4f}, {d['upper']:+.4f}]"
            for other, d in row["minus"].items()
        )
        print(f"{name:24} {row['ndcg@10']['estimate']:.4f}   {gaps}")
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="+", metavar="TEXT", help="whose name contains one")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "ranking")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def versions() -> dict[str, str]:
    """Versions of what the figures depend on.

    Raises:
        SystemExit: With the line that installs what is missing.
    """
    try:
        return {name: version(name) for name in PACKAGES}
    except PackageNotFoundError as missing:
        sys.exit(f"{missing.name} is missing: pip install scikit-learn==1.9.1 lightgbm==4.7.0")


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    found_versions = versions()
    data = os.environ.get("XRISK_DATA")
    if data is None:
        sys.exit("set XRISK_DATA to the directory that holds lambdarank/rank.train")
    bench = Bench(Path(data) / "lambdarank", args.folder)
    results: dict[str, Any] = {}
    for regime, methods in REGIMES.items():
        wanted = [m for m in methods if not args.methods or any(t in m for t in args.methods)]
        found = {method: bench.tested(regime, method) for method in wanted}
        results[regime] = report(regime, found)
    torch.manual_seed(0)
    chance = [ndcg(torch.rand(len(bench.test.query)), bench.test) for _ in range(100)]
    record = {
        "python": platform.python_version(),
        **found_versions,
        "threads": 1,
        "metric": f"sklearn.metrics.ndcg_score, k={K}, gains 2^y - 1, mean over 50 test queries",
        "random_scores": float(np.mean(chance)),
        "intervals": Bootstrap(len(bench.test.sizes)).method.replace("prompts", "queries"),
        "seconds_of_all_runs": sum(entry["seconds"] for entry in bench.done.values()),
        "results": results,
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nrandom scores {record['random_scores']:.4f}; written to {args.results}")


if __name__ == "__main__":
    main()
