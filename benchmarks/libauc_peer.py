"""LibAUC's side of `benchmarks/imbalanced.py`, run by the interpreter of an environment of its own.

    python -m venv libauc-venv
    libauc-venv/bin/pip install torch==2.14.1 torchvision==0.29.1 tqdm scikit-learn
    libauc-venv/bin/pip install --no-deps libauc==2.0.1
    python benchmarks/imbalanced.py --libauc-python libauc-venv/bin/python

`--no-deps` leaves out what losses, optimizers and samplers do not import: transformers,
torch_geometric, ogb, webdataset, opencv and the like. Reads runs as lines of JSON from standard
input, and answers each with a line. Losses, optimizers and sampler are LibAUC's own with their
defaults; scores go through a sigmoid where the setting says so, as in its examples.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.tabular import grid, training
from benchmarks.tabular.store import encode
from benchmarks.tabular.training import Context, Run, Step, usual_step

Loss = Callable[..., Tensor]


def main() -> None:
    """Answer one line of JSON for each on standard input; without any, say what this is."""
    if sys.stdin.isatty() or "--help" in sys.argv:
        print(__doc__)
        return
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # LibAUC prints
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request.pop("folder"))
        spec = Run(**request)
        start = time.perf_counter()
        with np.load(folder / f"{spec.data}.npz") as arrays:
            scores = run(spec, dict(arrays))
        answer = {"scores": encode(scores), "seconds": time.perf_counter() - start}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def run(spec: Run, data: dict[str, np.ndarray]) -> np.ndarray:
    """Train and predict; the same network and number of steps as on the other side."""
    targets = data["y_train"]
    num_steps = training.EPOCHS * training.steps_per_epoch(targets)
    model = training.network(data["x_train"].shape[1], 1, spec.seed)
    context = Context(model, spec, torch.as_tensor(targets), num_steps)
    step = BUILDERS[spec.method](context)
    training.train(context, step, data["x_train"], sampled(targets, spec.seed))
    return training.predict(model, data["x_eval"])


def sampled(targets: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Batches of LibAUC's DualSampler."""
    from libauc.sampler import DualSampler  # pyright: ignore

    sampler = DualSampler(
        None,
        batch_size=training.BATCH,
        labels=targets,
        num_pos=training.POSITIVES,
        sampling_rate=None,
        random_seed=seed,
    )
    for _ in range(training.EPOCHS):
        yield from np.fromiter(sampler, dtype=np.int64).reshape(-1, training.BATCH)


def surrogate(context: Context) -> dict[str, Any]:
    """LibAUC's arguments for the surrogate that a setting names."""
    if context.setting.get("surrogate") == "logistic":
        return {"surr_loss": "logistic"}
    return {"surr_loss": "squared_hinge", "margin": context.setting.get("margin", 1.0)}


def pairwise(context: Context) -> Step:
    """PairwiseAUCLoss and LibAUC's Adam."""
    from libauc.losses import PairwiseAUCLoss  # pyright: ignore
    from libauc.optimizers import Adam  # pyright: ignore

    sharpness = context.setting.get("sharpness")
    name = "squared_hinge" if sharpness is None else "logistic"
    loss = PairwiseAUCLoss(name, context.setting.get("margin", sharpness))
    return step_of(context, Adam(context.network.parameters(), lr=context.lr), loss, index=False)


def margin(version: str) -> Callable[[Context], Step]:
    """AUCMLoss and PESG, by SGD or by Adam."""

    def build(context: Context) -> Step:
        from libauc.losses import AUCMLoss  # pyright: ignore
        from libauc.optimizers import PESG  # pyright: ignore

        loss = AUCMLoss(version=version, device="cpu")
        optimizer = PESG(
            context.network.parameters(),
            loss_fn=loss,
            lr=context.lr,
            mode=context.setting["mode"],
            device="cpu",
        )
        return step_of(context, optimizer, loss, index=False)

    return build


def compositional(context: Context) -> Step:
    """CompositionalAUCLoss, whose cross-entropy takes probabilities, and PDSCA."""
    from libauc.losses import CompositionalAUCLoss  # pyright: ignore
    from libauc.optimizers import PDSCA  # pyright: ignore

    loss = CompositionalAUCLoss(version=context.setting["version"], device="cpu")
    beta_1, beta_2 = context.setting["betas"]
    optimizer = PDSCA(
        context.network.parameters(),
        loss_fn=loss,
        lr=context.lr,
        beta1=beta_1,
        beta2=beta_2,
        device="cpu",
    )

    def of_probabilities(scores: Tensor, targets: Tensor, index: Tensor) -> Tensor:
        return loss(scores.sigmoid(), targets.float())

    return usual_step(context, optimizer, of_probabilities)


def precision(context: Context) -> Step:
    """APLoss and SOAP, in its Adam mode."""
    from libauc.losses import APLoss  # pyright: ignore
    from libauc.optimizers import SOAP  # pyright: ignore

    gamma, options = context.setting["gamma"], surrogate(context)
    loss = APLoss(len(context.targets), gamma=gamma, device="cpu", **options)
    return step_of(context, SOAP(context.network.parameters(), lr=context.lr, device="cpu"), loss)


def partial(mode: str) -> Callable[[Context], Step]:
    """pAUCLoss of a mode, and the optimizer of that name in its Adam mode."""

    def build(context: Context) -> Step:
        from libauc import losses, optimizers  # pyright: ignore
        from libauc.losses.auc import tpAUC_CVaR_loss  # pyright: ignore

        size, setting = len(context.targets), context.setting
        min_tpr, max_fpr = grid.TPAUC_REGION
        if mode == "SOPA":
            positives = int(context.targets.sum())
            options = {"data_len": size, "pos_len": positives, "beta": setting["max_fpr"]}
            loss = losses.pAUC_CVaR_Loss(device="cpu", **options)
        elif mode == "SOPAs":
            loss = losses.pAUC_DRO_Loss(size, Lambda=setting["tau"], device="cpu")
        elif mode == "SOTAs":
            taus = {"tau": setting["tau1"], "Lambda": setting["tau2"]}
            loss = losses.tpAUC_KL_Loss(size, device="cpu", **taus)
        else:
            region = {"theta_0": 1 - min_tpr, "theta_1": max_fpr}
            loss = tpAUC_CVaR_loss(size, threshold=setting["margin"], device="cpu", **region)
        optimizer = getattr(optimizers, mode)
        parameters = context.network.parameters()
        return step_of(context, optimizer(parameters, lr=context.lr, device="cpu"), loss)

    return build


def step_of(context: Context, optimizer: Any, loss: Loss, *, index: bool = True) -> Step:
    """A step of LibAUC's loss: index is its third argument where the loss keeps state."""
    optimizer.verbose = False

    def of_rows(scores: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        return loss(scores, targets, rows) if index else loss(scores, targets)

    return usual_step(context, optimizer, of_rows)


BUILDERS: dict[str, Callable[[Context], Step]] = {
    "LibAUC PairwiseAUCLoss, squared hinge": pairwise,
    "LibAUC PairwiseAUCLoss, logistic": pairwise,
    "LibAUC AUCM v1 + PESG": margin("v1"),
    "LibAUC AUCM v2 + PESG": margin("v2"),
    "LibAUC CompositionalAUC + PDSCA": compositional,
    "LibAUC APLoss + SOAP": precision,
    **{f"LibAUC {mode}": partial(mode) for mode in ("SOPA", "SOPAs", "STACO", "SOTAs")},
}

if __name__ == "__main__":
    main()
