"""ClassGather: sampled classes, their weights, and steps whose cost does not depend on K."""

import io
import itertools
import math
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_xrisk.models.class_gather import ClassGather
from llm_xrisk.objectives.extreme_classification import ExtremeClassification

DIM, ROWS = 8, 32


def head_of(num_classes: int, extra: int = 0, beta: float = 1.0) -> ClassGather:
    torch.manual_seed(0)
    counts = torch.ones(num_classes, dtype=torch.long)
    return ClassGather(num_classes, DIM, counts=counts, extra=extra, beta=beta)


def step_of(head: ClassGather, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """One training step on rows of the classes 0, 300, 600, ...; returns the sampled classes."""
    objective = ExtremeClassification(ROWS, head.num_classes)
    features, labels = torch.randn(ROWS, DIM), torch.arange(ROWS) * 300

    def step() -> Tensor:
        optimizer.zero_grad()
        logits = head(features, labels)
        index = torch.arange(ROWS)
        objective(logits.scores, logits.targets, index=index, weight=logits.weight).loss.backward()
        head.average_gradient()
        optimizer.step()
        return logits.classes

    return step


def make_optimizer(name: str, head: ClassGather) -> torch.optim.Optimizer:
    if name == "SparseAdam":
        return torch.optim.SparseAdam(head.parameters(), lr=0.1)
    return torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.0)


def test_scores_are_the_logits_of_the_distinct_labels() -> None:
    head, features = head_of(1000), torch.randn(4, DIM)
    labels = torch.tensor([900, 7, 900, 12])
    logits = head(features, labels)
    assert logits.classes.tolist() == [7, 12, 900]
    assert logits.targets.tolist() == [2, 0, 2, 1]
    torch.testing.assert_close(logits.scores, features @ head.weight[[7, 12, 900]].T)


def test_extra_classes_come_from_the_generator_alone() -> None:
    head, features, labels = head_of(10**5, extra=64), torch.randn(2, DIM), torch.tensor([3, 9])
    before = torch.get_rng_state()
    drawn = [head(features, labels, torch.Generator().manual_seed(s)).classes for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert all({3, 9} <= set(classes.tolist()) and len(classes) > 60 for classes in drawn)


@pytest.mark.parametrize("extra", [0, 2])
def test_weights_are_unbiased_over_all_draws(extra: int) -> None:
    """Every draw of the other rows' labels and of extra classes, times its probability."""
    counts, values = torch.tensor([4, 3, 2, 1]), torch.tensor([0.5, 2.0, -1.0, 7.0])
    head, own, rows = ClassGather(4, DIM, counts=counts, extra=extra), 1, 3
    mean = torch.tensor(0.0, dtype=torch.float64)
    for others in itertools.product(range(4), repeat=rows - 1):
        for more in itertools.product(range(4), repeat=extra):
            classes = torch.tensor(sorted({own, *others, *more}))
            weight = head.importance(classes, rows)
            chance = math.prod(float(counts[k]) / 10 for k in others) / 4**extra
            mean += chance * (weight * values[classes])[classes != own].sum()
    assert float(mean) == pytest.approx((0.5 - 1.0 + 7.0) / 4, rel=1e-6)


def test_weights_of_rare_classes_are_one_over_k_b_q() -> None:
    """pi = (B - 1) q to first order, and 1 for a class that is always there."""
    counts = torch.ones(10**6, dtype=torch.long)
    counts[0] = 10**6
    head = ClassGather(10**6, 1, counts=counts)
    weight = head.importance(torch.tensor([0, 5]), 65)
    assert weight[0].item() == pytest.approx(1e-6, rel=1e-6)
    assert weight[1].item() == pytest.approx(1 / (64 * 0.5), rel=1e-4)  # 1 / (K 64 / (2 K))


def test_without_counts_classes_count_alike() -> None:
    assert ClassGather(50, DIM)(torch.zeros(2, DIM), torch.tensor([1, 2])).weight is None


def test_a_batch_of_one_row_has_nothing_to_tell_its_class_from() -> None:
    head = head_of(50)
    logits = head(torch.randn(1, DIM), torch.tensor([3]))
    output = ExtremeClassification(1, 50)(
        logits.scores, logits.targets, index=torch.tensor([0]), weight=logits.weight
    )
    assert output.loss.item() == 0.0
    assert output.metrics["skipped"].item() == 1.0


@pytest.mark.parametrize("name", ["SGD", "SparseAdam"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("num_classes", [10**4, 10**6])
def test_a_step_touches_the_rows_of_its_classes_and_no_others(
    name: str, beta: float, num_classes: int
) -> None:
    head = head_of(num_classes, extra=16, beta=beta)
    optimizer = make_optimizer(name, head)
    step = step_of(head, optimizer)
    for _ in range(3):
        before, average = head.weight.detach().clone(), head.direction
        average = None if average is None else average.clone()
        classes = step()
        assert head.weight.grad.is_sparse
        assert head.weight.grad.coalesce().indices()[0].tolist() == classes.tolist()
        changed = (head.weight.detach() != before).any(-1).nonzero().flatten()
        assert changed.tolist() == classes.tolist()
        assert 32 <= len(changed) <= 48
        if average is not None:
            moved = (head.direction != average).any(-1).nonzero().flatten()
            assert moved.tolist() == classes.tolist()


def allocated(step: Callable[[], Tensor]) -> int:
    """Bytes asked for during a step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())


def seconds(step: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    for _ in range(5):
        step()
    return (time.perf_counter() - start) / 5


@pytest.mark.parametrize("name", ["SGD", "SparseAdam"])
def test_time_and_memory_of_a_step_do_not_depend_on_the_number_of_classes(name: str) -> None:
    steps = []
    for num_classes in (10**4, 10**6):
        head = head_of(num_classes, beta=0.5)
        steps.append(step_of(head, make_optimizer(name, head)))
        steps[-1]()  # Adam allocates its moments
    small, large = (allocated(step) for step in steps)
    assert large == small
    assert large < 10**6 * DIM * 4 / 10  # far from one pass over the classes
    times = [[seconds(step) for step in steps] for _ in range(15)]  # in turn: the machine is shared
    small, large = (statistics.quantiles(t, n=5)[0] for t in zip(*times, strict=True))
    assert large < 1.5 * small + 1e-4


def test_momentum_is_lines_9_and_10_in_loops() -> None:
    head = head_of(12, beta=0.25)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    weight = head.weight.detach().clone()
    average = torch.zeros_like(weight)
    for labels in ([1, 5, 5], [5, 2, 7], [1, 7, 7]):
        features, own = torch.randn(3, DIM), torch.tensor(labels)
        optimizer.zero_grad()
        logits = head(features, own)
        F.cross_entropy(logits.scores, logits.targets).backward()
        dense = head.weight.grad.to_dense()
        head.average_gradient()
        optimizer.step()
        for k in set(labels):
            average[k] = 0.75 * average[k] + 0.25 * dense[k]  # line 9
            weight[k] -= 0.5 * average[k]  # line 10
    torch.testing.assert_close(head.weight.detach(), weight)
    torch.testing.assert_close(head.direction, average)


def test_training_approaches_the_exact_cross_entropy_of_all_classes() -> None:
    """In-batch labels of uneven frequency: with weights the fit of all classes, without not."""
    generator = torch.Generator().manual_seed(0)
    labels = (300 * torch.rand(512, generator=generator) ** 3).long()  # class 0: every seventh
    features = torch.eye(4)[labels % 4] + 0.1 * torch.randn(512, 4, generator=generator)
    counts = torch.bincount(labels, minlength=300)
    reached = {}
    for weighted in (True, False):
        head = ClassGather(300, 4, counts=counts if weighted else None, extra=8, std=0.0)
        objective = ExtremeClassification(512, 300, gamma=0.2, method="sox")
        optimizer = torch.optim.SGD(head.parameters(), lr=2.0)
        for _ in range(400):
            index = torch.randint(512, (16,), generator=generator)
            logits = head(features[index], labels[index], generator)
            optimizer.zero_grad()
            output = objective(logits.scores, logits.targets, index=index, weight=logits.weight)
            output.loss.backward()
            optimizer.step()
        reached[weighted] = float(head.cross_entropy(features, labels).mean())
    assert reached[True] < reached[False] - 0.1, reached


def test_exact_cross_entropy_in_parts_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_xrisk.models.class_gather._CHUNK_CLASSES", 7)
    head, features = ClassGather(40, DIM, std=1.0).double(), torch.randn(5, DIM).double()
    labels = torch.randint(40, (5,))
    want = F.cross_entropy(features @ head.weight.T, labels, reduction="none")
    torch.testing.assert_close(head.cross_entropy(features, labels), want.detach())


def test_state_survives_saving_and_a_narrow_dtype_leaves_the_counts() -> None:
    counts = torch.full((40,), 10**6 + 1)
    head = ClassGather(40, DIM, counts=counts, beta=0.5).to(torch.bfloat16)
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    other = ClassGather(40, DIM, counts=torch.ones(40), beta=0.5).to(torch.bfloat16)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    classes = torch.tensor([1, 2])
    assert torch.equal(other.counts, counts)
    assert torch.equal(other.importance(classes, 9), head.importance(classes, 9))
    assert torch.equal(other.weight, head.weight)


@pytest.mark.parametrize(
    "options", [{"num_classes": 1}, {"dim": 0}, {"extra": -1}, {"beta": 0.0}, {"std": -1.0}]
)
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"need num_classes >= 2, .* got "):
        ClassGather(**{"num_classes": 5, "dim": 2} | options)


def test_counts_that_do_not_fit_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"counts must be \(5,\), got \(4,\); use torch.bincount"):
        ClassGather(5, 2, counts=torch.ones(4))
    never = torch.tensor([1, 0, 2])
    with pytest.raises(ValueError, match=r"1 classes have count 0.*pass extra >= 1"):
        ClassGather(3, 2, counts=never)
    assert ClassGather(3, 2, counts=never, extra=1).extra == 1


def test_rows_and_labels_that_do_not_fit_are_refused() -> None:
    head = head_of(50)
    with pytest.raises(ValueError, match=r"need features \(B, 8\).*got \(2, 3, 8\) and \(2, 3\)"):
        head(torch.zeros(2, 3, DIM), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(IndexError, match=r"class 50 is out of range for num_classes=50"):
        head(torch.zeros(1, DIM), torch.tensor([50]))


def test_the_average_stays_in_float32_beside_a_bfloat16_weight() -> None:
    head = ClassGather(num_classes=10, dim=3, beta=0.1).to(torch.bfloat16)
    features = torch.randn(4, 3, dtype=torch.bfloat16)
    head(features, torch.tensor([1, 2, 3, 1])).scores.float().square().sum().backward()
    head.average_gradient()
    assert head.direction.dtype == torch.float32
    assert head.direction.any()
    assert head.weight.grad.dtype == torch.bfloat16


FEATURES, LABELS = torch.randn(4, 3), torch.tensor([1, 2, 3, 0])


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        (FEATURES.numpy(), LABELS, TypeError, r"got features as a NumPy array \(4, 3\)"),
        (FEATURES, [1, 2, 3, 0], TypeError, "got labels as a list of 4 and needs a tensor"),
        (torch.randn(4, 7), LABELS, ValueError, r"need features \(B, 3\) .* got \(4, 7\)"),
        (FEATURES.long(), LABELS, ValueError, "got torch.int64 and torch.int64"),
        (FEATURES, LABELS.float(), ValueError, r"got torch.float32 and torch.float32"),
        (FEATURES, LABELS == 1, ValueError, r"torch.bool; of one-hot labels take argmax\(1\)"),
        (FEATURES, LABELS + 2, IndexError, "class 5 is out of range for num_classes=5"),
        (FEATURES, LABELS - 100, IndexError, "class -100 is out of range for num_classes=5"),
    ],
)
def test_rows_that_are_no_features_and_classes_are_refused(
    features: Tensor, labels: Tensor, error: type[Exception], message: str
) -> None:
    head = ClassGather(5, 3)
    for method in (head, head.cross_entropy):
        with pytest.raises(error, match=message):
            method(features, labels)


def test_counts_are_whole_numbers_in_a_tensor() -> None:
    with pytest.raises(ValueError, match="counts must be numbers of examples, got fractions"):
        ClassGather(5, 3, counts=torch.full((5,), 0.5))
    with pytest.raises(TypeError, match="counts of ClassGather must be a tensor or None, got a li"):
        ClassGather(5, 3, counts=[1] * 5)
