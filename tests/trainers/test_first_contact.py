"""What people try first, and what it tells them."""

import pytest
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import Qwen3ForCausalLM

from llm_xrisk.data import with_index
from llm_xrisk.data.fingerprint import model_fingerprint
from llm_xrisk.trainers import DisCOTrainer, RolloutConfig
from tests.trainers.build import (
    LORA,
    dft_trainer,
    disco_config,
    disco_trainer,
    even_code,
    logged,
    pairs,
    questions,
    tiny_model,
    tokenizer,
)


def test_each_of_several_evaluation_sets_is_evaluated(tmp_path):
    parts = {"first": questions(4), "second": questions(2)}
    trainer = disco_trainer(
        tmp_path, eval_dataset=parts, max_steps=1, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    for name in parts:
        assert len(logged(trainer, f"eval_{name}_reward")) == 1
    assert {"eval_first_reward", "eval_second_mean_length"} <= set(trainer.evaluate())


def test_nothing_is_said_about_callbacks(tmp_path, caplog):
    dft_trainer(tmp_path)
    disco_trainer(tmp_path)
    assert "callbacks" not in caplog.text


@pytest.mark.parametrize("functions", ["a/reward-model", ["a/reward-model"]])
def test_a_reward_model_in_place_of_a_function(tmp_path, functions):
    with pytest.raises(ValueError, match=r"got 'a/reward-model' among .* wrap a reward model"):
        disco_trainer(tmp_path, reward=functions)


def test_questions_without_a_prompt(tmp_path):
    rows = [{"question": "1+1=", "answer": "2"}]
    with pytest.raises(ValueError, match=r"columns \['answer', 'question'\], needs `prompt`"):
        disco_trainer(tmp_path, rows=rows)


def test_a_stream_of_rows(tmp_path):
    with pytest.raises(TypeError, match="got a IterableDataset, which has no length"):
        disco_trainer(tmp_path, rows=Dataset.from_list(questions()).to_iterable_dataset())
    with pytest.raises(TypeError, match="got a IterableDataset, which has no length"):
        dft_trainer(tmp_path, rows=Dataset.from_list(pairs()).to_iterable_dataset())


def test_preference_rows_with_the_prompt_inside_the_answers(tmp_path):
    from trl import extract_prompt

    rows = [{"chosen": f"{k}+1={k + 1}", "rejected": f"{k}+1=77"} for k in range(8)]
    data = with_index(Dataset.from_list(rows))
    with pytest.raises(ValueError, match=r"no prompt; .*dataset.map\(trl.extract_prompt\)"):
        dft_trainer(tmp_path, rows=data)
    trainer = dft_trainer(tmp_path, rows=data.map(extract_prompt), num_negatives=1, max_steps=1)
    trainer.train()
    assert tokenizer().decode(trainer.train_dataset[3]["prompt_ids"]) == "3+1="


def test_training_without_data(tmp_path):
    trainer = DisCOTrainer(
        tiny_model(),
        disco_config(tmp_path),
        reward_funcs=even_code,
        processing_class=tokenizer(),
        rollout=RolloutConfig(num_generations=4),
    )
    with pytest.raises(ValueError, match="got no train_dataset"):
        trainer.train()


def test_an_adapter_by_its_name_is_refused_for_training_and_as_a_reference(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter; to train it further .*is_trainable=True"):
        dft_trainer(tmp_path, model=str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"from an adapter's directory, .*merge_and_unload"):
        model_fingerprint(Qwen3ForCausalLM.from_pretrained(tmp_path / "adapter"))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    trainer = dft_trainer(tmp_path, model=again, max_steps=1)
    trainer.train()
    assert logged(trainer, "grad_norm")[0] > 0


def test_the_best_model_of_disco_is_the_one_with_the_highest_reward(tmp_path):
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    trainer = disco_trainer(
        tmp_path,
        eval_dataset=questions(4),
        max_steps=2,
        save_steps=1,
        load_best_model_at_end=True,
        **every_step,
    )
    trainer.train()
    assert trainer.args.greater_is_better is True
    assert trainer.state.best_metric == max(logged(trainer, "eval_reward"))
