"""Methods of this package, and the baselines, built for a run."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tabular import grid, training
from benchmarks.tabular.training import Context, Run, Step, usual_step
from llm_xrisk import objectives as o
from llm_xrisk.data import DualSampler
from llm_xrisk.objectives import surrogates
from llm_xrisk.optim import CompositionalTraining

DIGITS_STEPS, DIGITS_BATCH = 400, 32


def run(spec: Run, data: dict[str, np.ndarray]) -> np.ndarray:
    """Train and predict: (n,) scores on mammography, (n, 10) on digits."""
    if spec.data.startswith("digits"):
        return run_digits(spec, data)
    targets = data["y_train"]
    num_steps = training.EPOCHS * training.steps_per_epoch(targets)
    model = training.network(data["x_train"].shape[1], 1, spec.seed)
    context = Context(model, spec, torch.as_tensor(targets), num_steps)
    if spec.method == "BCE, shuffled":
        batches: Iterator[Any] = training.shuffled(len(targets), spec.seed, num_steps)
    else:
        batches = sampled(targets, spec.seed)
    training.train(context, BUILDERS[spec.method](context), data["x_train"], batches)
    return training.predict(model, data["x_eval"])


def sampled(targets: np.ndarray, seed: int) -> Iterator[list[int]]:
    """The epochs of the sampler, of as many steps as LibAUC's."""
    sampler = DualSampler(
        targets,
        batch_size=training.BATCH,
        num_pos=training.POSITIVES,
        drop_last=True,
        seed=seed,
    )
    for _ in range(training.EPOCHS):
        yield from sampler


def adam(context: Context, *modules: nn.Module) -> torch.optim.Optimizer:
    """Adam of the network and of what an objective learns."""
    parameters = [p for m in (context.network, *modules) for p in m.parameters()]
    return torch.optim.Adam(parameters, lr=context.lr)


def cross_entropy(context: Context) -> Step:
    """Binary cross-entropy, positives weighted."""
    weight = torch.tensor(float(context.setting["weight"]))

    def loss(scores: Tensor, targets: Tensor, index: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, targets.float(), pos_weight=weight)

    return usual_step(context, adam(context), loss)


def focused(losses: Tensor, exponent: float) -> Tensor:
    """Losses times (1 - p)^exponent, p = exp(-loss) the probability of the true class."""
    # at p = 1 a power below 1 has an infinite slope
    return (1 - (-losses).exp()).clamp(min=1e-6) ** exponent * losses


def focal(context: Context) -> Step:
    """Focal loss: cross-entropy times (1 - p of the true class)^exponent."""
    exponent = context.setting["exponent"]

    def loss(scores: Tensor, targets: Tensor, index: Tensor) -> Tensor:
        rows = F.binary_cross_entropy_with_logits(scores, targets.float(), reduction="none")
        return focused(rows, exponent).mean()

    return usual_step(context, adam(context), loss)


def surrogate(context: Context) -> surrogates.Surrogate:
    """The pairwise surrogate a setting names; squared hinge with margin 1 by default."""
    setting = context.setting
    if "sharpness" in setting:
        return surrogates.Logistic(1 / setting["sharpness"])
    if setting.get("surrogate") == "logistic":
        return surrogates.Logistic()
    return surrogates.SquaredHinge(setting.get("margin", 1.0))


def with_objective(make: Callable[[Context], o.Objective]) -> Callable[[Context], Step]:
    """An objective of this package, trained by Adam."""

    def build(context: Context) -> Step:
        objective = make(context)

        def loss(scores: Tensor, targets: Tensor, index: Tensor) -> Tensor:
            return objective(scores, targets, index=index).loss

        return usual_step(context, adam(context, objective), loss)

    return build


def compositional(context: Context) -> Step:
    """AUCMargin at the weights that a step of cross-entropy leads to."""
    objective = o.AUCMargin()
    optimizer = adam(context, objective)
    method = CompositionalTraining(optimizer, tau=context.setting["tau"])

    def step(features: Tensor, targets: Tensor, index: Tensor) -> None:
        def inner() -> Tensor:
            scores = context.network(features).squeeze(-1)
            return F.binary_cross_entropy_with_logits(scores, targets.float())

        optimizer.zero_grad()
        method.backward(inner, lambda: objective(context.scores(features), targets).loss)
        optimizer.step()

    return step


def precision(context: Context, prior: float | None) -> o.Objective:
    """Average precision at the sampler's or at the data's share of positives."""
    return o.AveragePrecision(
        len(context.targets),
        gamma=context.setting["gamma"],
        surrogate=surrogate(context),
        prior=prior,
    )


def size(context: Context) -> int:
    """Number of training rows."""
    return len(context.targets)


MIN_TPR, MAX_FPR = grid.TPAUC_REGION
BUILDERS: dict[str, Callable[[Context], Step]] = {
    "BCE, shuffled": cross_entropy,
    grid.BASELINE: cross_entropy,
    "Focal, DualSampler": focal,
    "PairwiseAUC, squared hinge": with_objective(lambda c: o.PairwiseAUC(surrogate=surrogate(c))),
    "PairwiseAUC, logistic": with_objective(lambda c: o.PairwiseAUC(surrogate=surrogate(c))),
    "AUCMargin": with_objective(lambda c: o.AUCMargin(surrogate=surrogate(c))),
    "AUCMargin, compositional": compositional,
    "AveragePrecision": with_objective(lambda c: precision(c, None)),
    "AveragePrecision, prior": with_objective(
        lambda c: precision(c, float(c.targets.float().mean()))
    ),
    "OPAUC": with_objective(lambda c: o.OPAUC(size(c), max_fpr=c.setting["max_fpr"])),
    "OPAUCSoft": with_objective(lambda c: o.OPAUCSoft(size(c), tau=c.setting["tau"])),
    "TPAUC": with_objective(
        lambda c: o.TPAUC(size(c), min_tpr=MIN_TPR, max_fpr=MAX_FPR, surrogate=surrogate(c))
    ),
    "TPAUCSoft": with_objective(
        lambda c: o.TPAUCSoft(size(c), tau1=c.setting["tau1"], tau2=c.setting["tau2"])
    ),
}


def run_digits(spec: Run, data: dict[str, np.ndarray]) -> np.ndarray:
    """Ten classes, shuffled batches, a loss of each row's cross-entropy."""
    model = training.network(data["x_train"].shape[1], 10, spec.seed)
    robust = o.KLDRO(tau=spec.setting["tau"]) if "tau" in spec.setting else None
    decay = spec.setting.get("weight_decay", 0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=spec.lr, weight_decay=decay)
    x, y = torch.as_tensor(data["x_train"]), torch.as_tensor(data["y_train"])
    for rows in training.shuffled(len(y), spec.seed, DIGITS_STEPS, DIGITS_BATCH):
        index = torch.as_tensor(rows)
        smoothing = spec.setting.get("smoothing", 0.0)
        losses = F.cross_entropy(
            model(x[index]), y[index], reduction="none", label_smoothing=smoothing
        )
        if "exponent" in spec.setting:
            losses = focused(losses, spec.setting["exponent"])
        optimizer.zero_grad()
        (losses.mean() if robust is None else robust(losses).loss).backward()
        optimizer.step()
    return training.predict(model, data["x_eval"])
