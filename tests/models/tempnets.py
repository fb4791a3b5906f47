"""TempNets, batches and plain autograd forms of both, for the tests of this folder."""

from typing import Any

import torch
from torch import Tensor

from llm_xrisk.models.tempnet import TempNet

V, RHO = 17, 1.5
IGNORED = -100


def net_of(vocab_size: int = V, **options: Any) -> TempNet:
    """Weights far enough from the first ones that every gradient is felt."""
    net = TempNet(vocab_size, **{"rho": RHO, "hidden_size": 8} | options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net.double().eval()


def batch(rows: int = 3, positions: int = 5, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    logits = scale * torch.randn(rows, positions, V, dtype=torch.float64)
    targets = torch.randint(V, (rows, positions))
    targets[0, :2] = targets[-1, -1] = IGNORED
    return logits, targets


def plain_temperature(net: TempNet, logits: Tensor) -> Tensor:
    """The network as the paper's formula, one token at a time, without its modules' forward."""
    weights, config = dict(net.named_parameters()), net.config
    found = []
    for s in logits.detach().reshape(-1, logits.shape[-1]):
        x = s - s.max()
        x = x / (x @ x).sqrt()
        hidden = 1 / (1 + torch.exp(-(weights["project.weight"] @ x + weights["project.bias"])))
        q = weights["mix.weight"] @ hidden + weights["mix.bias"]
        p = torch.exp(q / torch.exp(weights["scaler"]))
        pooled = (p / p.sum() - 1 / len(q)) * q
        score = (weights["last.weight"][0] * pooled).sum() + weights["last.bias"][0]
        width = config.tau_max - config.tau_min
        found.append(config.tau_min + width / (1 + torch.exp(-score)))
    return torch.stack(found).view(logits.shape[:-1])


def plain_loss(logits: Tensor, targets: Tensor, tau: Tensor, rho: float = RHO) -> Tensor:
    """tau log mean exp((s_k - s_y) / tau) + rho tau, the first form of the objective."""
    found = []
    for row, position in (targets != IGNORED).nonzero().tolist():
        s, t = logits[row, position], tau[row, position]
        y = int(targets[row, position])
        found.append(t * torch.log(torch.exp((s - s[y]) / t).mean()) + rho * t)
    return torch.stack(found).mean()


def close(found: Tensor, wanted: Tensor, error: float = 1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=error, atol=error)
