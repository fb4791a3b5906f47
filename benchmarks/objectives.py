"""Time of a loss, forward and backward, on one thread: ours, plain autograd, LibAUC.

    OMP_NUM_THREADS=1 python benchmarks/objectives.py [--libauc-python PATH]

Each number is the median over rounds of a round's 20th percentile (other processes only ever add
time); rounds take the losses in turn. Ratios are to binary cross-entropy, and for contrastive ones
to the InfoNCE of the same views: SimCLR's of 2B views, or CLIP's between B images and B texts. PATH
is the interpreter of an environment with libauc 2.0.1, which this one does not need. JSON goes to
benchmarks/results/.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[], Tensor]
RESULTS = Path(__file__).parent / "results"
SEED, SAMPLES, WIDTH, SHARE = 0, 10_000, 128, 0.25
LABELS, LABELLED_BATCH = 20, 256
INFO_NCE, CLIP_INFO_NCE = "InfoNCE of 2B views", "InfoNCE between two views (CLIP)"


def rows(batch: int) -> dict[str, Tensor]:
    """Scores and views with a gradient, a quarter positives (first, as LibAUC's sampler gives)."""
    generator = torch.Generator().manual_seed(SEED)
    first = torch.randn(batch, WIDTH, generator=generator)
    return {
        "scores": torch.randn(batch, generator=generator).requires_grad_(),
        "targets": (torch.arange(batch) < SHARE * batch).long(),
        "first": first.requires_grad_(),
        "second": (first + torch.randn(batch, WIDTH, generator=generator))
        .detach()
        .requires_grad_(),
        "index": torch.randperm(SAMPLES, generator=generator)[:batch],
        "group": torch.arange(batch) // 4,
        "length": torch.full((batch,), 20),
        "kl": torch.rand(batch, generator=generator),
    }


def baselines(batch: int) -> dict[str, Step]:
    """Losses without state, and the objectives' values written in plain autograd (gamma = 1)."""
    data = rows(batch)
    scores, labels, positive = data["scores"], data["targets"].float(), data["targets"] == 1

    def pairwise() -> Tensor:
        return F.relu(1 + scores[None, :] - scores[positive][:, None]).square()

    def plain_average_precision() -> Tensor:
        loss = pairwise()
        return -((loss * positive).mean(1) / loss.mean(1)).mean()

    def plain_opauc() -> Tensor:
        return torch.logsumexp(pairwise()[:, ~positive], 1).mean()

    def info_nce() -> Tensor:
        views = F.normalize(torch.cat([data["first"], data["second"]]), dim=-1)
        logits = views @ views.T / 0.1
        logits = logits.masked_fill(torch.eye(2 * batch, dtype=torch.bool), float("-inf"))
        return F.cross_entropy(logits, torch.arange(2 * batch).roll(batch))

    def clip_info_nce() -> Tensor:
        first, second = F.normalize(data["first"], dim=-1), F.normalize(data["second"], dim=-1)
        logits, diagonal = first @ second.T / 0.1, torch.arange(batch)
        return F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)

    return {
        "BCE": lambda: F.binary_cross_entropy_with_logits(scores, labels),
        "AveragePrecision, plain autograd": plain_average_precision,
        "OPAUCSoft, plain autograd": plain_opauc,
        INFO_NCE: info_nce,
        CLIP_INFO_NCE: clip_info_nce,
    }


def ours(batch: int) -> dict[str, Step]:
    """Every objective of this package, by its name."""
    from llm_xrisk.objectives import OBJECTIVES

    cases = classes(batch) | lists(batch) | sequences(batch) | views(batch) | robust(batch)
    missing = set(OBJECTIVES) - set(cases)
    if missing:
        raise KeyError(f"no row for {sorted(missing)}; add one in {Path(__file__).name}")
    return cases


def classes(batch: int) -> dict[str, Step]:
    """Objectives of a positive and a negative class."""
    from llm_xrisk import objectives as o

    data = rows(batch)
    scores, targets, index = data["scores"], data["targets"], data["index"]
    keyed = (o.AveragePrecision, o.OPAUC, o.OPAUCSoft, o.TPAUC, o.TPAUCSoft)
    built = {kind.__name__: kind(SAMPLES) for kind in keyed}
    built |= {"PairwiseAUC": o.PairwiseAUC(), "AUCMargin": o.AUCMargin()}
    return {name: partial(loss_of, built[name], scores, targets, index=index) for name in built}


def several_labels(batch: int) -> dict[str, Step]:
    """The same for many labels at once, a tenth of the rows positive, and BCE."""
    from llm_xrisk import objectives as o

    generator = torch.Generator().manual_seed(SEED)
    scores = torch.randn(batch, LABELS, generator=generator).requires_grad_()
    targets = (torch.rand(batch, LABELS, generator=generator) < 0.1).long()
    labels, index = targets.float(), torch.randperm(SAMPLES, generator=generator)[:batch]
    keyed = (o.AveragePrecision, o.OPAUC, o.OPAUCSoft, o.TPAUC, o.TPAUCSoft)
    built = {kind.__name__: kind(SAMPLES, num_labels=LABELS) for kind in keyed}
    built |= {kind.__name__: kind(num_labels=LABELS) for kind in (o.PairwiseAUC, o.AUCMargin)}
    return {
        "BCE": lambda: F.binary_cross_entropy_with_logits(scores, labels),
        **{name: partial(loss_of, built[name], scores, targets, index=index) for name in built},
    }


def lists(batch: int) -> dict[str, Step]:
    """Objectives of ranked lists, of 16 items with 4 relevant ones each."""
    from llm_xrisk import objectives as o
    from llm_xrisk.objectives.ndcg import ranking_statistics

    scores, query = rows(batch)["scores"], torch.arange(batch) // 16
    relevant = (torch.arange(batch) % 4 == 0).long()
    statistics = ranking_statistics(relevant, query)
    built = {
        "NDCG": o.NDCG(SAMPLES, *statistics),
        "TopKNDCG": o.TopKNDCG(SAMPLES, *ranking_statistics(relevant, query, top_k=5), top_k=5),
        "ListwiseCrossEntropy": o.ListwiseCrossEntropy(SAMPLES, *statistics[:2]),
    }
    given = {"index": torch.arange(batch), "query": query}
    return {name: partial(loss_of, built[name], scores, relevant, **given) for name in built}


def sequences(batch: int) -> dict[str, Step]:
    """Objectives of language models, four rows a question."""
    from llm_xrisk import objectives as o

    data = rows(batch)
    scores, group = data["scores"], data["group"]
    mixed = (torch.arange(batch) % 4 == 0).long()
    trust = {"group": group, "kl": data["kl"], "length": data["length"]}
    tuned = {
        "DFT": partial(o.DFT(SAMPLES), index=group, ref_log_likelihood=-20 * data["kl"]),
        "DFT2": partial(o.DFT2(SAMPLES), index=group),
    }
    reasoning = (o.DisCO(), o.GRPO(), o.DAPO(), o.DrGRPO(max_length=20))
    built = tuned | {type(kind).__name__: partial(kind, **trust) for kind in reasoning}
    return {name: partial(loss_of, built[name], scores, mixed) for name in built}


def views(batch: int) -> dict[str, Step]:
    """Contrastive objectives of two views of 128 numbers, and of scores of sampled classes."""
    from llm_xrisk import objectives as o

    data = rows(batch)
    both = (data["first"], data["second"])
    keyed = (o.GlobalContrastive, o.RobustGlobalContrastive, o.GlobalCLIP)
    built = {kind.__name__: partial(kind(SAMPLES), index=data["index"]) for kind in keyed}
    built |= {kind.__name__: kind() for kind in (o.InfoNCE, o.CLIPLoss)}
    extreme = o.ExtremeClassification(SAMPLES, num_classes=10 * SAMPLES)
    own, index = torch.arange(batch) % WIDTH, data["index"]
    return {
        "ExtremeClassification": partial(loss_of, extreme, data["first"], own, index=index),
        **{name: partial(loss_of, built[name], *both) for name in built},
    }


def robust(batch: int) -> dict[str, Step]:
    """Distributionally robust means of losses."""
    from llm_xrisk import objectives as o

    losses = rows(batch)["scores"]
    kinds = (o.KLDRO, o.KLConstrainedDRO, o.CVaRDRO, o.Chi2DRO, o.Chi2ConstrainedDRO)
    return {kind.__name__: partial(loss_of, kind(), losses) for kind in kinds}


def loss_of(objective: Callable[..., Any], *tensors: Tensor, **given: Tensor) -> Tensor:
    """The loss of an objective's output."""
    return objective(*tensors, **given).loss


def libauc(batch: int) -> dict[str, Step]:
    """The same objectives of LibAUC; its sampler imports torchvision for a type check only."""
    for name in ("torchvision", "torchvision.datasets", "webdataset", "transformers"):
        try:
            __import__(name)
        except Exception:
            sys.modules[name] = types.ModuleType(name)
    from libauc.losses import APLoss, GCLoss_v1, pAUC_DRO_Loss  # pyright: ignore

    data = rows(batch)
    scores, targets, index = data["scores"], data["targets"], data["index"]
    positives = int(targets.sum())
    precision = APLoss(data_len=SAMPLES, gamma=0.1, device="cpu")
    partial = pAUC_DRO_Loss(data_len=SAMPLES, gamma=0.9, Lambda=1.0, device="cpu")
    contrastive = GCLoss_v1(N=SAMPLES, tau=0.1, distributed=False, device="cpu")
    own = index[:positives]
    return {
        "LibAUC APLoss": lambda: precision(scores.sigmoid(), targets, index),
        "LibAUC pAUC_DRO_Loss": lambda: partial(scores.sigmoid(), targets, own),
        "LibAUC GCLoss_v1": lambda: contrastive(data["first"], data["second"], index),
    }


def measure(cases: dict[str, Step], rounds: int, calls: int) -> dict[str, float]:
    """Milliseconds of a forward and backward pass of each case."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, step in cases.items():
            for _ in range(5):
                step().backward()
            taken = []
            for _ in range(calls):
                start = time.perf_counter()
                step().backward()
                taken.append(time.perf_counter() - start)
            times[name].append(1e3 * statistics.quantiles(taken, n=5)[0])
    return {name: statistics.median(values) for name, values in times.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--libauc-python", help="interpreter of an environment with libauc")
    parser.add_argument("--hardware", default=f"cpu-{platform.machine()}", help="names the file")
    parser.add_argument("--only-libauc", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def libauc_times(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run this file's LibAUC half in its own interpreter."""
    counts = ["--rounds", str(args.rounds), "--calls", str(args.calls)]
    batches = ["--batches", *map(str, args.batches)]
    command = [args.libauc_python, __file__, "--only-libauc", *counts, *batches]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def table(batch: int, times: dict[str, float], labels: int = 1) -> list[dict[str, object]]:
    """Rows of a loss, its milliseconds, and the ratio to its baseline; printed on the way."""
    result = []
    print(f"\nB = {batch}, labels = {labels}\n{'loss':36} {'ms':>8}   ratio")
    for name, ms in times.items():
        base = INFO_NCE if any(word in name for word in ("NCE", "Contrastive", "GCLoss")) else "BCE"
        base = CLIP_INFO_NCE if "CLIP" in name else base
        print(f"{name:36} {ms:8.3f}   {ms / times[base]:6.2f} x {base}")
        result.append(
            {"batch": batch, "labels": labels, "loss": name, "ms": ms}
            | {"ratio": ms / times[base], "to": base}
        )
    return result


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    if args.only_libauc:
        times = {b: measure(libauc(b), args.rounds, args.calls) for b in args.batches}
        print(json.dumps(times))
        return
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    other = libauc_times(args) if args.libauc_python else {}
    results = []
    for batch in args.batches:
        cases = baselines(batch) | ours(batch)
        times = measure(cases, args.rounds, args.calls) | other.get(str(batch), {})
        results += table(batch, times)
    times = measure(several_labels(LABELLED_BATCH), args.rounds, args.calls)
    results += table(LABELLED_BATCH, times, LABELS)
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "libauc": "2.0.1" if other else None,
        "threads": 1,
        "seed": SEED,
        "rounds": args.rounds,
        "calls": args.calls,
        "positives": SHARE,
        "measure": "median over rounds of the 20th percentile, milliseconds",
        "results": results,
    }
    path = RESULTS / f"objectives-{args.hardware}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
