"""DFTTrainer: references, evaluation, adapters, precision."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from llm_xrisk.data.collators import pad_rows
from llm_xrisk.rollout import SamplingConfig
from llm_xrisk.rollout.scoring import sequence_log_probs
from llm_xrisk.trainers import DFTTrainer
from tests.trainers.build import (
    LORA,
    dft_config,
    dft_trainer,
    logged,
    losses,
    pairs,
    tiny_model,
    tokenizer,
    weights,
)


def prepared_rows(trainer: DFTTrainer) -> list[dict]:
    return [dict(trainer.train_dataset[k]) for k in range(len(trainer.train_dataset))]


def reference_of(model: PreTrainedModel, rows: list[dict]) -> list[list[float]]:
    """log pi_ref of every negative, one row after another."""
    return [
        [
            sum(scores)
            for scores in sequence_log_probs(
                model, [row["prompt_ids"]] * len(row["negative_ids"]), row["negative_ids"]
            )
        ]
        for row in rows
    ]


# -- the reference policy --------------------------------------------------------------------------


def test_cached_likelihoods_are_those_of_the_initial_model(tmp_path):
    trainer = dft_trainer(tmp_path, max_steps=1)
    rows = prepared_rows(trainer)
    expected = reference_of(tiny_model(), rows)
    trainer.train()
    for row, likelihoods in zip(rows, expected, strict=True):
        cached = trainer.data_collator.reference[row["index"]]
        assert cached == pytest.approx(likelihoods, abs=1e-4)


def test_a_pool_s_likelihoods_train_like_those_computed_here(tmp_path):
    computed = dft_trainer(tmp_path / "computed")
    rows = prepared_rows(computed)
    computed.train()
    table = computed.data_collator.reference
    pool = [row | {"ref_log_likelihoods": table[row["index"]]} for row in rows]
    given = dft_trainer(tmp_path / "given", rows=pool)
    given.train()
    assert losses(given) == losses(computed)
    assert torch.equal(weights(given.model), weights(computed.model))


def test_live_likelihoods_of_the_adapter_switched_off_equal_cached_ones(tmp_path):
    """Step by step: the adapter trains, its reference stays, no second model is needed."""
    torch.manual_seed(0)  # of the adapter
    live = dft_trainer(tmp_path / "live", peft_config=LoraConfig(**LORA), max_steps=6)
    rows = prepared_rows(live)
    cached = [
        row | {"ref_log_likelihoods": likelihoods}
        for row, likelihoods in zip(rows, reference_of(tiny_model(), rows), strict=True)
    ]
    live.train()
    torch.manual_seed(0)
    other = dft_trainer(
        tmp_path / "cached", rows=cached, peft_config=LoraConfig(**LORA), max_steps=6
    )
    other.train()
    assert losses(live) == pytest.approx(losses(other), rel=1e-6)
    assert losses(live)[-1] != losses(live)[0]


@pytest.mark.parametrize("objective", ["DFT", "DFT2"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_no_second_model_ever_exists(tmp_path, monkeypatch, objective, kind):
    tiny_model().save_pretrained(tmp_path / "base")
    loaded: list[str] = []
    built: list[PreTrainedModel] = []
    from_pretrained, init = PreTrainedModel.from_pretrained.__func__, PreTrainedModel.__init__

    def loading(cls, *args, **kwargs):
        loaded.append(cls.__name__)
        return from_pretrained(cls, *args, **kwargs)

    def building(self, *args, **kwargs):
        built.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(loading))
    monkeypatch.setattr(PreTrainedModel, "__init__", building)
    trainer = dft_trainer(
        tmp_path,
        model=str(tmp_path / "base"),
        peft_config=LoraConfig(**LORA) if kind == "lora" else None,
        objective=objective,
        max_steps=2,
    )
    trainer.train()
    assert loaded == ["Qwen3ForCausalLM"]
    # the causal model and the decoder inside it, once each
    assert sorted(type(model).__name__ for model in built) == ["Qwen3ForCausalLM", "Qwen3Model"]


def test_an_adapter_that_is_given_is_trained_and_nothing_else(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(**LORA))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = dft_trainer(tmp_path, model=model)
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_an_adapter_on_top_of_an_adapter_is_refused(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(**LORA))
    with pytest.raises(ValueError, match="a PEFT model and a peft_config; pass the base model"):
        dft_trainer(tmp_path, model=model, peft_config=LoraConfig(**LORA))


def test_dft_without_negatives_is_supervised_fine_tuning(tmp_path):
    trainer = dft_trainer(tmp_path, num_negatives=0, max_steps=1, per_device_train_batch_size=24)
    rows = prepared_rows(trainer)
    batch = pad_rows(
        [r["prompt_ids"] for r in rows], [r["completion_ids"] for r in rows], pad_token_id=0
    )
    labels = batch["input_ids"].masked_fill(~batch["completion_mask"], -100)
    model = tiny_model()
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=positions,
        labels=labels,
    )
    trainer.train()
    tokens = int(batch["completion_mask"].sum())
    assert losses(trainer)[0] == pytest.approx(out.loss.item() * tokens / len(rows), rel=1e-5)


# -- evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["DFT", "DFT2"])
def test_evaluation_leaves_the_tracked_values_alone(tmp_path, objective):
    trainer = dft_trainer(tmp_path, eval_dataset=pairs(10), objective=objective)
    trainer.train()
    before = {name: value.clone() for name, value in trainer.objective.state_dict().items()}
    metrics = trainer.evaluate()
    for name, value in trainer.objective.state_dict().items():
        assert torch.equal(value, before[name])
    assert {"eval_loss", "eval_auc", "eval_score/gold"} <= set(metrics)


def test_evaluation_is_the_objective_of_the_evaluation_rows(tmp_path):
    """Not that of training rows which happen to have the same index."""
    rows = [row | {"index": k} for k, row in enumerate(reversed(pairs(24)))][:8]
    trainer = dft_trainer(tmp_path, eval_dataset=rows, num_negatives=3, max_steps=3)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    given = trainer._prepare_eval(rows)
    expected = []
    for row, reference in zip(given, reference_of(tiny_model(), given), strict=True):
        answers = [row["completion_ids"], *row["negative_ids"]]
        prompts = [row["prompt_ids"]] * 4
        gold, *wrong = map(sum, sequence_log_probs(trainer.model, prompts, answers))
        exponents = torch.tensor(wrong) - torch.tensor(reference)
        expected.append(-gold + (exponents.logsumexp(0) - torch.tensor(3.0).log()).item())
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_evaluation_works_before_training_and_for_several_sets(tmp_path):
    sets = {"one": pairs(6), "two": pairs(4)}
    trainer = dft_trainer(tmp_path, eval_dataset=sets, max_steps=2)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert {"eval_one_loss", "eval_two_loss"} <= set(before) & set(after)
    assert after["eval_one_loss"] < before["eval_one_loss"]


def test_evaluation_during_training_draws_the_same_negatives_every_time(tmp_path):
    trainer = dft_trainer(
        tmp_path,
        eval_dataset=pairs(6),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=6,
        learning_rate=0.0,
    )
    trainer.train()
    seen = logged(trainer, "eval_loss")
    assert len(seen) == 6
    assert len(set(seen)) == 1


def test_new_text_rows_cannot_be_evaluated_once_the_model_has_moved(tmp_path):
    trainer = dft_trainer(tmp_path, max_steps=1)
    trainer.evaluate(pairs(4))
    trainer.train()
    with pytest.raises(ValueError) as caught:
        trainer.evaluate(pairs(4))
    assert "without ref_log_likelihoods" in str(caught.value)
    assert "moved away from the reference" in str(caught.value)
    assert "pass them as eval_dataset" in str(caught.value)


# -- precision and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing(tmp_path, kind):
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        peft_config = LoraConfig(**LORA) if kind == "lora" else None
        trainer = dft_trainer(
            tmp_path, gradient_checkpointing=checkpointing, peft_config=peft_config
        )
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        runs.append((losses(trainer), weights(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0][0] != runs[0][0][-1]


@pytest.mark.parametrize("objective", ["DFT", "DFT2"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_bfloat16_autocast_trains_and_keeps_the_state_in_float32(tmp_path, objective, accumulation):
    settings = {"objective": objective, "gradient_accumulation_steps": accumulation}
    half = dft_trainer(tmp_path / "half", bf16=True, **settings)
    half.train()
    whole = dft_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert half.objective.inner.u.dtype == torch.float32
    assert half.objective.inner.visited.any()
    assert losses(half) == pytest.approx(losses(whole), rel=0.05)
    assert losses(half) != losses(whole)


def test_dropout_is_off_unless_asked_for(tmp_path):
    model = tiny_model(attention_dropout=0.5)
    lora = LoraConfig(**LORA, lora_dropout=0.5)
    trainer = dft_trainer(tmp_path, model=model, peft_config=lora, max_steps=1)
    rates = [m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates
    assert set(rates) == {0.0}
    trainer.train()
    batch = trainer.data_collator([dict(trainer.train_dataset[0])])
    trainer.model.train()
    one, two = (trainer.token_log_probs(trainer.model, batch).log_probs for _ in range(2))
    assert torch.equal(one, two)


# -- fresh negatives -------------------------------------------------------------------------------


def refreshing(folder, **changes) -> DFTTrainer:
    rows = pairs(24)[5:] + pairs(24)[:5]  # shuffled after it was numbered
    settings = {"refresh_negatives": 2, "max_steps": 4} | changes
    return DFTTrainer(
        tiny_model(),
        dft_config(folder, **settings),
        train_dataset=rows,
        processing_class=tokenizer(),
        sampling=SamplingConfig(max_new_tokens=4),
    )


def test_fresh_negatives_follow_their_own_prompts(tmp_path):
    trainer = refreshing(tmp_path)
    given = {row["index"]: row for row in prepared_rows(trainer)}
    seen: list[tuple[int, tuple[int, ...], float]] = []

    def watch(batch):
        for k, index in enumerate(batch["index"].tolist()):
            real = batch["input_ids"][k][batch["attention_mask"][k].bool()].tolist()
            prompt = given[index]["prompt_ids"]
            assert real[: len(prompt)] == prompt
            if batch["targets"][k] > 0.5:
                assert real[len(prompt) :] == given[index]["completion_ids"]
            else:
                assert real[len(prompt) :] not in given[index]["negative_ids"]
                seen.append((index, tuple(real), float(batch["ref_log_likelihood"][k])))
        return batch

    with_reference = trainer._with_reference
    trainer._with_reference = lambda batch: watch(with_reference(batch))
    trainer.train()
    assert len(seen) >= 4 * 8
    assert all(likelihood < 0 for _, _, likelihood in seen)


def test_fresh_negatives_come_from_a_policy_of_at_most_k_steps_ago(tmp_path):
    trainer = refreshing(tmp_path, max_steps=5)
    versions: list[int] = []
    refresh = trainer._refresh

    def watch(batch):
        fresh = refresh(batch)
        versions.append(trainer._engine.policy_version)
        return fresh

    trainer._refresh = watch
    trainer.train()
    assert versions == [0, 0, 0, 0, 2, 2, 2, 2, 4, 4]


def test_a_resumed_run_draws_the_same_fresh_negatives(tmp_path):
    settings = {"refresh_negatives": 3, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = refreshing(tmp_path / "a", **settings)
    whole.train()
    again = refreshing(tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert losses(again)[-2:] == losses(whole)[-2:]
    assert torch.equal(weights(again.model), weights(whole.model))


# -- the cache of reference likelihoods ------------------------------------------------------------


def test_a_resumed_run_needs_the_cache_it_started_with(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    dft_trainer(tmp_path, **settings).train()
    cache = tmp_path / "ref_log_likelihood.safetensors"
    rows = [row | {"negatives": ["1", "22", "333"]} for row in pairs()]
    trainer = dft_trainer(tmp_path, rows=rows, **settings)
    with pytest.raises(
        ValueError, match="of other rows than this data set's; resume with the data"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    cache.unlink()
    trainer = dft_trainer(tmp_path, **settings)
    with pytest.raises(FileNotFoundError, match="is missing, and the model has been trained"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_gamma_follows_its_schedule(tmp_path):
    trainer = dft_trainer(tmp_path, gamma=0.5, gamma_decay_epochs=2.0, max_steps=9)
    seen: list[float] = []
    weigh = trainer.get_batch_samples

    def watch(*args):
        seen.append(round(float(trainer.objective.inner.gamma), 3))
        return weigh(*args)

    trainer.get_batch_samples = watch
    trainer.train()  # three steps an epoch
    assert seen == [1.0] * 3 + [0.75] * 3 + [0.5] * 3


def test_the_model_card_s_checkpoint_holds_no_training_rows(tmp_path):
    trainer = dft_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in names
    assert "objective.safetensors" not in names
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "qwen3"
