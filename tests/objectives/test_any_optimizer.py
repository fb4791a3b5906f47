"""Objectives beside the optimizers people use: groups, foreach, fused, schedules."""

from typing import Any

import pytest
import torch

from llm_xrisk.objectives import AUCMargin, OPAUCSoft


@pytest.mark.parametrize(
    "options",
    [
        {"foreach": True},
        {"foreach": False},
        {"fused": True},
        {"amsgrad": True},
    ],
)
@pytest.mark.parametrize("kind", [AUCMargin, OPAUCSoft])
def test_any_variant_of_adamw_lowers_the_objective(kind: Any, options: dict[str, bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(80, 4, generator=generator)
    targets = (features[:, 0] > 1).long()
    model = torch.nn.Linear(4, 1)
    objective = kind() if kind is AUCMargin else kind(80)
    groups = [
        {"params": [model.weight], "lr": 0.05},
        {"params": [model.bias], "lr": 0.01, "weight_decay": 0.0},
        {"params": list(objective.parameters()), "lr": 0.1, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    before = objective.exact(model(features).squeeze(-1), targets).item()
    for _ in range(40):
        rows = torch.randperm(80, generator=generator)[:40]
        loss = objective(model(features[rows]).squeeze(-1), targets[rows], index=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert objective.exact(model(features).squeeze(-1), targets).item() < 0.5 * before
