"""Discriminative fine-tuning (Algorithm 36)."""

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.groups import group_mean, slots
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.base import ObjectiveOutput, later
from llm_xrisk.objectives.pairs import rows_of
from llm_xrisk.objectives.reductions import masked_mean, observed_max, observed_mean, widened
from llm_xrisk.objectives.scores import SCORES
from llm_xrisk.objectives.sequence import SequenceObjective, effective_in_group


class DFT(SequenceObjective):
    r"""DFT, Algorithm 36: raises the likelihood of the gold answer above that of sampled ones.

    *Discriminative* fine-tuning; not TRL's ``loss_type="dft"``, which is Dynamic Fine-Tuning.

    .. math:: F(w) = \frac1n \sum_i \Big[ -s(w; y_i, x_i) + \tau \log
              E_{y' \sim \pi_{ref}(\cdot|\bar x_i)}
              \frac{\exp(s(w; y', x_i)/\tau)}{\pi_{ref}(y'|x_i)} \Big] \qquad (6.69)

    Inner value g_i = mean_j exp(a_ij) with a_ij = s_ij / tau - log pi_ref(y'_ij | x_i), outer
    function f = tau log, tracked as log u_i by the moving average (6.72) in the form of (6.14).
    The gradient is (6.73) with the u of this step; the loss is the objective's value at u.
    ``s`` is the sum of the tokens' log-probabilities. DFT without negatives is SFT.

    Args:
        num_samples: n, the number of prompts.
        gamma: Weight of the new mini-batch value in (0, 1]; 0.85 in the authors' recipe.
        tau: Temperature > 0; 1.0 in the authors' recipe.
        importance_weight: Divide by pi_ref(y'|x); without it (6.71) is optimised.
        score: "log_likelihood" (sum) or "mean_log_likelihood".
        u_init: "one" is u_0 = 1 as Algorithm 36 has it; "first_batch" stores the first
            mini-batch value instead. Their results are not comparable.
        state_dtype: dtype of the state.

    Shapes:
        scores (R,), targets (R,) 1 for gold and 0 for sampled answers, index (R,) the prompt of
        each row (rows of one prompt form its group, in any order), ref_log_likelihood (R,).

    State: one log u per prompt, 5 bytes; ``objective.safetensors`` in a trainer's checkpoint.

    Departures: (6.72) writes B^0 for the negatives' batch and (6.73) u_{i,t+1} for u_{i,t}. The
    authors' code reports a surrogate whose value is not the objective, averages u over ranks only
    at the end of an epoch and loses it on resume. A prompt that stands twice in a mini-batch (on
    two ranks, say) pools its negatives: each of its gold rows counts, its u moves once.

    Raises:
        ValueError: tau <= 0, gamma outside (0, 1], an unknown score or u_init, a missing index,
            or missing reference likelihoods.

    Example:
        >>> objective = DFT(num_samples=10, gamma=1.0)
        >>> scores = torch.tensor([-2.0, -3.0, -3.0])
        >>> targets, index = torch.tensor([1, 0, 0]), torch.tensor([7, 7, 7])
        >>> ref = torch.tensor([0.0, -3.0, -3.0])       # the policy has not moved: g = 1
        >>> objective(scores, targets, index=index, ref_log_likelihood=ref).loss
        tensor(2.)

    Relations: ``gamma=1`` is the mini-batch loss; :class:`DFT2` drops the weight and averages
    over tokens; SOPA-s and SogCLR keep the same log u for other scores.

    Source: book section 6.6.2; Guo et al., arXiv 2502.18679, ICML 2025.
    """

    def __init__(
        self,
        num_samples: int,
        gamma: float | GammaSchedule = 0.85,
        tau: float = 1.0,
        *,
        importance_weight: bool = True,
        score: str = "log_likelihood",
        u_init: str = "one",
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(
                f"tau must be positive, got {tau}; the authors use 1.0 (DFT), 0.3 (DFT2)"
            )
        if score not in SCORES or score == "likelihood_ratio":
            raise ValueError(
                f'score must be "log_likelihood" or "mean_log_likelihood", got {score!r}'
            )
        if u_init not in ("one", "first_batch"):
            raise ValueError(f'u_init must be "one" or "first_batch", got {u_init!r}')
        self.tau, self.score, self.importance_weight = tau, score, importance_weight
        initial = 0.0 if u_init == "one" else None
        self.num_samples = num_samples
        self.inner = InnerEstimator(
            num_samples, gamma, log=True, initial=initial, state_dtype=state_dtype
        )

    def forward(
        self,
        scores: Tensor,
        targets: Tensor,
        *,
        index: Tensor | None = None,
        ref_log_likelihood: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class."""
        scores, targets, ids, ref = self.joined(
            scores, targets, index, ref_log_likelihood=ref_log_likelihood
        )
        gold, slot = targets > 0.5, slots(ids)
        exponent = self._exponent(scores, ref)
        whole, count = group_mean(exponent, slot, ~gold, log=True)
        contrasted = gold & (count > 0)
        rows = rows_of(contrasted)
        anchors, log_g = contrasted[rows], whole[rows]
        log_u = self.inner(log_g, ids[rows], where=anchors)
        normaliser = self.tau * log_u.masked_fill(~anchors, 0.0).sum()
        loss = (normaliser - scores.masked_fill(~gold, 0.0).sum()) / gold.sum().clamp(min=1)

        def metrics() -> dict[str, Tensor]:
            fraction = effective_in_group(exponent, whole, ~gold, slot)
            answer, _ = group_mean(scores, slot, gold)  # the gold answer's score, in all its rows
            wins, _ = group_mean((answer > scores).to(scores.dtype), slot, ~gold)
            return {
                "objective": loss.detach(),
                "log_u/mean": observed_mean(log_u, anchors),
                "log_u/max": observed_max(log_u, anchors),
                "negatives/weight": observed_mean((log_g - log_u).exp(), anchors),
                "negatives/effective_fraction": observed_mean(
                    fraction[rows],
                    anchors & (count[rows] > 1),  # one negative has nothing to weigh
                ),
                "score/gold": observed_mean(scores, gold),
                "score/negative": observed_mean(scores, ~gold),
                "auc": observed_mean(wins[rows], anchors),
            }

        return ObjectiveOutput(loss, later(metrics))

    def exact(
        self,
        scores: Tensor,
        targets: Tensor,
        *,
        index: Tensor,
        ref_log_likelihood: Tensor | None = None,
    ) -> Tensor:
        """(6.69) with the mean over all given negatives, without state."""
        gold = targets > 0.5
        exponent = self._exponent(widened(scores), ref_log_likelihood)
        log_g, count = group_mean(exponent, slots(index), ~gold, log=True)
        return masked_mean(self.tau * log_g.masked_fill(count == 0, 0.0) - scores, gold)

    def _exponent(self, scores: Tensor, ref: Tensor | None) -> Tensor:
        if not self.importance_weight:
            return scores / self.tau
        if ref is None:
            raise ValueError(
                "DFT weighs each sampled answer by 1 / pi_ref and got no ref_log_likelihood; "
                "pass log pi_ref(y'|x) of every row, or set importance_weight=False (DFT2)"
            )
        return scores / self.tau - ref


class DFT2(DFT):
    r"""DFT2, Algorithm 36 on (6.71): scores averaged over tokens, no reference weight.

    .. math:: F(w) = \frac1n \sum_i \Big[ -s_i + \tau \log \frac1m \sum_j
              \exp(s_{ij}/\tau) \Big], \qquad s = \tfrac{1}{|y|} \log \pi_w(y|x) \qquad (6.71)

    Inner value g_i = mean_j exp(s_ij / tau), outer function and gradient as :class:`DFT`.
    No reference model and no cached likelihoods are needed.
    With u_0 = 1 the first visits push the negatives with weight g / (1 - gamma + gamma g) only;
    ``u_init="first_batch"`` starts them at full weight.

    Args:
        num_samples: n, the number of prompts.
        gamma: Weight of the new mini-batch value in (0, 1]; 0.9 in the authors' recipe.
        tau: Temperature > 0; 0.3 in the authors' recipe.
        u_init: "one" or "first_batch".
        state_dtype: dtype of the state.

    Shapes:
        scores (R,), targets (R,) 1 for gold and 0 for sampled answers, index (R,).

    State: one log u per prompt, 5 bytes.

    Departures: as :class:`DFT`; the authors keep u_0 = 1 here too, so that is the default.

    Raises:
        ValueError: tau <= 0, gamma outside (0, 1], an unknown u_init, or a missing index.

    Example:
        >>> objective = DFT2(num_samples=1, gamma=1.0, tau=0.5)
        >>> scores, targets = torch.tensor([-1.0, -2.0]), torch.tensor([1, 0])
        >>> objective(scores, targets, index=torch.tensor([0, 0])).loss
        tensor(-1.)

    Relations: :class:`DFT` with ``importance_weight=False`` and mean scores; tau to infinity
    weighs the negatives alike, tau to 0 picks the likeliest.

    Source: book section 6.6.2; the authors' ``ref_free`` option.
    """

    def __init__(
        self,
        num_samples: int,
        gamma: float | GammaSchedule = 0.9,
        tau: float = 0.3,
        *,
        u_init: str = "one",
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            num_samples,
            gamma,
            tau,
            importance_weight=False,
            score="mean_log_likelihood",
            u_init=u_init,
            state_dtype=state_dtype,
        )
