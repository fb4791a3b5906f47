"""Samplers behind accelerate's loaders and in transformers' Trainer, on one process and on two."""

import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from llm_xrisk.data import DualSampler, QuerySampler, with_index
from tests.gloo import GlooPool

LABELS = (torch.arange(100) % 5 == 0).long()


class Rows(Dataset):
    def __len__(self):
        return len(LABELS)

    def __getitem__(self, row):
        return {"x": torch.tensor([float(row)])}


def dual(**options):
    return DualSampler(LABELS, batch_size=12, num_pos=4, **options)  # 10 batches


def query():
    return QuerySampler(
        LABELS, torch.arange(100) // 11, queries_per_batch=2, num_pos=1, num_neg=3, seed=4
    )


def as_rank(rank, world):
    """What a launcher sets, and no state of accelerate from before."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(world)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}


def prepared(sampler, *, split_batches=False):
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=split_batches)
    )
    loader = accelerator.prepare(DataLoader(with_index(Rows()), batch_sampler=sampler))
    return accelerator, loader


def played(loader):
    return [batch["index"].tolist() for batch in loader]


def test_a_prepared_loader_plays_the_sampler_and_its_epochs():
    for build in (dual, query):
        _, loader = prepared(build())
        alone = build()
        assert len(loader) == len(alone)
        assert [played(loader) for _ in range(3)] == [list(alone) for _ in range(3)]
        loader.set_epoch(1)
        alone.set_epoch(1)
        assert played(loader) == list(alone)


def test_a_prepared_loader_resumes_within_an_epoch():
    _, loader = prepared(dual())
    whole = [played(loader), played(loader)]
    sampler = dual()
    _, loader = prepared(sampler)
    played(loader)
    drawing = iter(loader)
    for _ in range(3):
        next(drawing)
    state = sampler.state_dict(step=3)
    assert sampler.state_dict()["step"] == 4  # accelerate has looked ahead
    resumed = dual()
    _, loader = prepared(resumed)
    resumed.load_state_dict(state)
    loader.set_epoch(resumed.epoch)
    assert played(loader) == whole[1][3:]
    assert played(loader) == list(dual_at(2))


def dual_at(epoch):
    sampler = dual()
    sampler.set_epoch(epoch)
    return sampler


def sharded(rank, split):
    as_rank(rank, 2)
    accelerator, loader = prepared(dual(), split_batches=split)
    assert accelerator.num_processes == 2
    epochs = [played(loader), played(loader)]
    loader.set_epoch(5)
    epochs.append(played(loader))
    resumed = dual()
    _, loader = prepared(resumed, split_batches=split)
    resumed.load_state_dict(dual_at(5).state_dict(step=4))
    loader.set_epoch(resumed.epoch)
    used = 4 if split else 2
    assert played(loader) == epochs[-1][used:]
    return [len(loader), *epochs]


def sharded_queries(rank):
    as_rank(rank, 2)
    _, loader = prepared(query())
    return played(loader)


class Scorer(nn.Module):
    """A model that remembers the rows it was trained on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen = []

    def forward(self, x, index):
        self.seen.append(index.tolist())
        return {"loss": self.layer(x / 100).square().mean()}


class SampledTrainer(Trainer):
    """As the documentation of the samplers says."""

    own_shards = True

    def get_train_dataloader(self):
        collate = {"collate_fn": self.data_collator}
        if not self.own_shards:
            loader = DataLoader(self.train_dataset, batch_sampler=dual(), **collate)
            return self.accelerator.prepare(loader)
        sampler = dual(num_replicas=self.args.world_size, rank=self.args.process_index)
        return DataLoader(self.train_dataset, batch_sampler=sampler, **collate)


def trained(folder, own_shards, checkpoint=None):
    """Rows of every step of two epochs; ``checkpoint`` resumes, after some steps."""
    model = Scorer()
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=2,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        save_strategy="no" if checkpoint else "steps",
    )
    trainer = SampledTrainer(model=model, args=arguments, train_dataset=with_index(Rows()))
    trainer.own_shards = own_shards
    trainer.train(resume_from_checkpoint=checkpoint)
    return model.seen


def trained_and_resumed(folder, own_shards):
    """A whole run, and others from within its first epoch, between the two, within the second."""
    whole = trained(folder, own_shards)
    return whole, {
        stop: trained(folder, own_shards, checkpoint=f"{folder}/checkpoint-{stop}")
        for stop in (4, 10, 14)
    }


@pytest.mark.parametrize("own_shards", [True, False])
def test_trainer_plays_the_sampler_and_resumes_anywhere(tmp_path, own_shards):
    whole, resumed = trained_and_resumed(str(tmp_path), own_shards)
    assert whole == [*dual_at(0), *dual_at(1)]
    assert resumed == {stop: whole[stop:] for stop in (4, 10, 14)}


def trained_on_rank(rank, folder):
    as_rank(rank, 2)
    return trained_and_resumed(folder, own_shards=True)


@pytest.fixture(scope="module")
def gloo():
    pool = GlooPool(2)
    yield pool
    pool.close()


@pytest.mark.dist
def test_accelerate_deals_whole_batches_to_two_ranks(gloo):
    one, other = gloo.run(2, sharded, False)
    assert one[0] == other[0] == 5
    for place, epoch in enumerate((0, 1, 5), start=1):
        whole = list(dual_at(epoch))
        assert (one[place], other[place]) == (whole[::2], whole[1::2])


@pytest.mark.dist
def test_accelerate_splits_batches_as_the_sampler_does(gloo):
    answers = gloo.run(2, sharded, True)
    for rank, (length, *epochs) in enumerate(answers):
        assert length == 10
        for epoch, batches in zip((0, 1, 5), epochs, strict=True):
            own = dual(num_replicas=2, rank=rank)
            own.set_epoch(epoch)
            assert batches == list(own)


@pytest.mark.dist
def test_accelerate_deals_batches_of_queries_that_differ_in_size(gloo):
    one, other = gloo.run(2, sharded_queries)
    whole = list(query())
    assert len(whole) == 5
    assert one == whole[::2]
    assert other == [*whole[1::2], whole[0]]  # an odd epoch begins again for the second rank


@pytest.mark.dist
def test_trainer_on_two_ranks_shares_each_batch_and_resumes_anywhere(gloo, tmp_path):
    answers = gloo.run(2, trained_on_rank, str(tmp_path))
    for rank, (whole, resumed) in enumerate(answers):
        own = dual(num_replicas=2, rank=rank)
        assert whole == [*own, *own]
        assert resumed == {stop: whole[stop:] for stop in (4, 10, 14)}
