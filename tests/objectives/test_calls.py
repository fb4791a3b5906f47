"""What an error about rows says: what came, what is needed, and what to do with such rows."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_xrisk.objectives import (
    KLDRO,
    NDCG,
    CVaRDRO,
    ExtremeClassification,
    ListwiseCrossEntropy,
    OPAUCSoft,
    PairwiseAUC,
    TopKNDCG,
    ranking_statistics,
)
from llm_xrisk.objectives.surrogates import Hinge, Logistic, Squared, SquaredHinge

SCORES, TARGETS, INDEX = torch.randn(6), torch.tensor([1, 0, 0, 1, 0, 1]), torch.arange(6)
QUERY = torch.tensor([0, 0, 0, 1, 1, 1])


class Output(NamedTuple):
    logits: Tensor


@pytest.mark.parametrize(
    ("scores", "targets", "todo"),
    [
        (SCORES[:, None], TARGETS, r"scores.squeeze\(-1\)"),
        (SCORES[:, None], TARGETS[:, None], r"scores.squeeze\(-1\), and that of targets"),
        (torch.randn(6, 2), TARGETS, r"logits\[:, 1\] - logits\[:, 0\]"),
        (torch.randn(6, 3), torch.ones(6, 3), "for 3 labels at once build it with num_labels=3"),
        (SCORES, TARGETS[:4], "one entry in each of them"),
    ],
)
def test_rows_of_another_shape_are_told_what_to_become(
    scores: Tensor, targets: Tensor, todo: str
) -> None:
    with pytest.raises(ValueError, match=rf"PairwiseAUC got scores .* needs scores.*; .*{todo}"):
        PairwiseAUC()(scores, targets)
    with pytest.raises(ValueError, match=todo):
        PairwiseAUC().exact(scores, targets)


def test_a_matrix_of_queries_is_told_to_become_rows() -> None:
    objective = NDCG.from_data(TARGETS, QUERY)
    with pytest.raises(ValueError, match=r"flatten \(queries, items\).*repeat_interleave\(items\)"):
        objective(SCORES.view(2, 3), TARGETS.view(2, 3), index=INDEX[:2], query=QUERY[:2])


def test_a_matrix_of_logits_is_told_to_become_losses() -> None:
    with pytest.raises(ValueError, match=r'one loss a row: F.cross_entropy\(.*reduction="none"\)'):
        KLDRO()(torch.randn(6, 3), torch.randn(6, 3))


@pytest.mark.parametrize("method", [KLDRO().exact, CVaRDRO(), CVaRDRO().exact])
def test_labels_in_the_place_of_reference_losses_are_refused(method: Any) -> None:
    with pytest.raises(ValueError, match=r"got targets of torch.int64, which look like labels"):
        method(SCORES, TARGETS)


@pytest.mark.parametrize(
    ("scores", "todo"),
    [
        (Output(SCORES), "pass its logits"),
        ((SCORES,), "torch.cat or torch.stack"),
        (SCORES.tolist(), r"got scores as a list of 6 .* torch.as_tensor\(scores\) makes one"),
        (None, "got scores as None and needs a tensor; pass one"),
    ],
)
def test_what_is_no_tensor_is_told_how_to_become_one(scores: Any, todo: str) -> None:
    with pytest.raises(TypeError, match=todo):
        OPAUCSoft(6)(scores, TARGETS, index=INDEX)


def test_targets_that_are_left_out_are_asked_for() -> None:
    with pytest.raises(TypeError, match=r"got targets as None .* pass targets=batch\['targets'\]"):
        PairwiseAUC()(SCORES, None)
    with pytest.raises(TypeError, match=r"missing a required argument: 'targets'; it takes"):
        PairwiseAUC()(SCORES)


def test_texts_are_told_to_become_numbers() -> None:
    objective = NDCG.from_data(TARGETS, QUERY)
    with pytest.raises(TypeError, match=r"query as a list of 6 .*numpy.unique\(ids, return_inv"):
        objective(SCORES, TARGETS, index=INDEX, query=list("aaabbb"))
    with pytest.raises(TypeError, match=r"index as a list of 6 .*with_index\(dataset\)"):
        objective(SCORES, TARGETS, index=list("abcdef"), query=QUERY)


@pytest.mark.parametrize("query", [QUERY - 1, QUERY + 5])
@pytest.mark.parametrize("kind", [NDCG, ListwiseCrossEntropy])
def test_queries_without_statistics_are_refused_by_exact_too(
    kind: type[NDCG | ListwiseCrossEntropy], query: Tensor
) -> None:
    objective = kind.from_data(TARGETS, QUERY)
    with pytest.raises(IndexError, match=r"out of range for 2 queries; number them 0..Q-1"):
        objective.exact(SCORES, TARGETS, query=query)
    with pytest.raises(IndexError, match=r"out of range for 2 queries; number them 0..Q-1"):
        objective(SCORES, TARGETS, query=query, index=INDEX)


def test_rows_on_several_devices_are_refused_with_each_place() -> None:
    with pytest.raises(ValueError, match=r"scores on cpu, targets on meta .*targets.to\(scores.d"):
        PairwiseAUC().exact(SCORES, TARGETS.to("meta"))


def test_sparse_and_complex_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got scores as a torch.sparse_coo tensor"):
        PairwiseAUC()(SCORES.to_sparse(), TARGETS)
    with pytest.raises(ValueError, match=r"got targets .* of torch.complex64"):
        PairwiseAUC()(SCORES, TARGETS.to(torch.complex64))


def test_an_error_of_a_surrogate_is_left_as_it_is() -> None:
    class Broken(Hinge):
        def with_slope(self, s: Tensor) -> tuple[Tensor, Tensor]:
            raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError, match="of the user's own"):
        PairwiseAUC(surrogate=Broken())(SCORES, TARGETS)


def test_what_a_batch_holds_is_checked_on_the_host() -> None:
    objective = OPAUCSoft(6)
    with pytest.raises(TypeError, match="got targets as a list of 2 and needs a tensor"):
        objective.check(targets=[0, 1])
    with pytest.raises(TypeError, match="got index as a list of 2"):
        PairwiseAUC().check(index=["a", "b"])


def test_an_index_of_a_subset_is_told_whose_length_counts() -> None:
    with pytest.raises(IndexError, match=r"left over from a larger data set .* largest index \+ 1"):
        OPAUCSoft(6)(SCORES, TARGETS, index=INDEX + 3)


@pytest.mark.parametrize("kind", [Hinge, SquaredHinge, Squared])
@pytest.mark.parametrize("margin", ["1.0", None, float("nan"), float("inf")])
def test_a_margin_is_a_finite_number(kind: type[Hinge], margin: Any) -> None:
    with pytest.raises(ValueError, match="margin must be a finite number, got "):
        kind(margin=margin)


@pytest.mark.parametrize("scale", [0.0, -1.0, "1"])
def test_a_scale_is_a_positive_number(scale: Any) -> None:
    with pytest.raises(ValueError, match="scale must be a positive number, got "):
        Logistic(scale=scale)


def test_the_ideal_gains_of_another_number_of_places_are_refused() -> None:
    whole, top = (ranking_statistics(TARGETS, QUERY, top_k=k) for k in (None, 2))
    TopKNDCG(6, *top, top_k=2), NDCG(6, *whole)
    with pytest.raises(ValueError, match=r"of all places and needs .* first 2; .*top_k=2\), or"):
        TopKNDCG(6, *whole, top_k=2)
    with pytest.raises(ValueError, match="of the first 2 and needs that of the first 1"):
        TopKNDCG(6, *top, top_k=1)
    with pytest.raises(ValueError, match="of the first 2 and needs that of all places"):
        NDCG(6, *top)


def test_an_objective_of_lists_is_built_from_the_data_in_one_step() -> None:
    statistics = ranking_statistics(TARGETS, QUERY, top_k=1)
    built = TopKNDCG.from_data(TARGETS, QUERY, top_k=1, gamma=0.5)
    assert torch.equal(built.ideal_dcg, statistics[2].float())
    assert (built.num_samples, built.top_k, built.inner.gamma.item()) == (6, 1, 0.5)
    assert torch.equal(ListwiseCrossEntropy.from_data(TARGETS, QUERY).num_items, statistics[0])
    with pytest.raises(TypeError, match="keyword argument 'top_k'; it takes NDCG"):
        NDCG.from_data(TARGETS, QUERY, top_k=1)


def test_all_three_statistics_are_too_many_for_the_cross_entropy() -> None:
    with pytest.raises(TypeError, match=r"too many positional .*num_relevant, \*, gamma"):
        ListwiseCrossEntropy(6, *ranking_statistics(TARGETS, QUERY))


@pytest.mark.parametrize(
    ("targets", "query", "message"),
    [
        (TARGETS.tolist(), QUERY, "got targets as a list of 6 and needs a tensor"),
        (TARGETS, np.array(list("aaabbb")), r"got query as a NumPy array .*numpy.unique"),
        (TARGETS, QUERY[:4], r"got targets \(6,\) and query \(4,\)"),
        (TARGETS[:0], QUERY[:0], r"got targets \(0,\) and query \(0,\)"),
        (TARGETS, QUERY.float(), "query must be integers, .* got torch.float32"),
        (TARGETS, QUERY - 1, "from -1 up: number the queries"),
        (TARGETS * 200, QUERY, "targets must be grades, .* got 200"),
        (TARGETS * float("nan"), QUERY, "targets must be grades, .* got nan"),
    ],
)
def test_data_without_statistics_are_refused(targets: Any, query: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ranking_statistics(targets, query)


@pytest.mark.parametrize("top_k", [0, -1, 2.5, "5"])
def test_a_number_of_places_is_an_integer_of_at_least_one(top_k: Any) -> None:
    with pytest.raises(ValueError, match="top_k must be an integer of at least 1, got "):
        ranking_statistics(TARGETS, QUERY, top_k=top_k)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": torch.tensor([3.0, 3.0])}, "num_items must be integers .* torch.float32"),
        ({"num_relevant": torch.tensor([[1], [2]])}, r"num_relevant must be .* \(2, 1\)"),
        ({"num_relevant": torch.tensor([-1, 2])}, "num_relevant must not be negative, got -1"),
        ({"num_items": [3, 3]}, r"num_items of NDCG must be a tensor, got a list of 2; ranking_st"),
        ({"ideal_dcg": torch.ones(3)}, r"ideal_dcg must be \(2,\), one for each query, got \(3,\)"),
        ({"ideal_dcg": torch.tensor([1.0, torch.inf])}, "ideal_dcg must be positive and finite"),
    ],
)
def test_statistics_that_are_none_are_refused(change: dict[str, Any], message: str) -> None:
    names = ("num_items", "num_relevant", "ideal_dcg")
    statistics = dict(zip(names, ranking_statistics(TARGETS, QUERY), strict=True))
    with pytest.raises((TypeError, ValueError), match=message):
        NDCG(6, **statistics | change)


@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.parametrize("method", ["scent", "sox", "bsgd"])
def test_a_gamma_outside_its_range_is_refused_by_every_method(gamma: float, method: str) -> None:
    with pytest.raises(ValueError, match=rf"gamma must be in \(0, 1\], got {gamma}"):
        ExtremeClassification(6, 3, gamma=gamma, method=method)
