"""Drawing without replacement: even at any time, no doubles, no favourites."""

import pytest
import torch

from llm_xrisk.data.sampler_draws import distinct, distinct_of_each, passes, seeded


@pytest.mark.parametrize(
    ("n", "k", "visits"), [(1, 1, 3), (5, 3, 40), (7, 7, 5), (3, 8, 9), (11, 10, 60), (64, 9, 30)]
)
def test_passes_are_even_at_any_time_and_visits_have_no_doubles(n, k, visits):
    drawn = passes(n, k, visits, seeded(n, k))
    assert drawn.shape == (visits, k)
    for end in range(1, visits + 1):
        often = drawn[:end].flatten().bincount(minlength=n)
        assert often.max() - often.min() <= 1
    for row in drawn:
        often = row.bincount(minlength=n)
        assert often.max() - often.min() <= 1


def test_every_item_is_as_likely_at_every_place():
    drawn = torch.stack([passes(4, 3, 4, seeded("places", i)).flatten() for i in range(6000)])
    for place in range(12):  # 1500 expected, sd 34
        assert (drawn[:, place].bincount(minlength=4) - 1500).abs().max() < 170


def test_items_held_back_do_not_gather_at_the_end_of_the_next_pass():
    # visits of 4 from passes of 10: 8 and 9 are of the first pass, 10 and 11 must be others
    places = torch.zeros(10)
    for i in range(4000):
        drawn = passes(10, 4, 5, seeded("held", i)).flatten()
        places += torch.isin(drawn[10:20], drawn[8:10])
    assert places[:2].tolist() == [0, 0]
    assert (places[2:] - 1000).abs().max() < 150  # sd 30


def test_few_of_many_are_distinct_and_uniform():
    drawn = torch.cat([distinct(320, 20, seeded("few", i)) for i in range(2000)]).view(2000, 20)
    assert all(len(row.unique()) == 20 for row in drawn)
    assert (drawn.flatten().bincount(minlength=320) - 125).abs().max() < 60  # sd 11
    assert distinct(16, 1, seeded(0)).shape == (1,)


def test_items_of_each_group_are_distinct_and_uniform():
    sizes = torch.tensor([0, 1, 3, 6, 7, 50]).repeat(4000)
    drawn = distinct_of_each(sizes, 3, seeded(1))
    assert torch.equal((drawn >= 0).sum(1), sizes.clamp(max=3))
    assert (drawn < sizes[:, None]).all()
    ordered = drawn.sort(1).values
    assert not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()
    for size in (6, 7, 50):
        for column in drawn[sizes == size].T:
            expected = 4000 / size
            spread = (column.bincount(minlength=size) - expected).abs().max()
            assert spread < 5 * expected**0.5
