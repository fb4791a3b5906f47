"""What ``llm_xrisk.trl`` leans on in TRL, and no document of TRL promises.

Red here after an upgrade of TRL: adapt ``llm_xrisk/trl.py``, then this file.
"""

import inspect

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import split_tensor_dict

from llm_xrisk.trl import _UNUSED

SIGNATURES = {
    "_prepare_inputs": ["self", "generation_batch"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_compute_loss": ["self", "model", "inputs"],
}
KEYS = {
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
    *("advantages", "num_items_in_batch", "old_per_token_logps"),
}
ATTRIBUTES = {
    *("_metrics", "accelerator", "num_generations", "num_generations_eval", "reward_weights"),
    *("aux_loss_enabled", "router_aux_loss_coef"),
}


def uses(function, name):
    """Whether the body of ``function`` speaks of the global or attribute ``name``."""
    return name in inspect.unwrap(function).__code__.co_names


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_wrapped_method_takes_what_it_took(name):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == SIGNATURES[name]


def test_the_methods_call_each_other_where_they_are_wrapped():
    assert uses(GRPOTrainer.compute_loss, "_compute_loss")
    assert uses(GRPOTrainer._prepare_inputs, "_generate_and_score_completions")
    assert uses(GRPOTrainer._generate_and_score_completions, "_calculate_rewards")
    assert uses(GRPOTrainer._compute_loss, "_get_per_token_logps_and_entropies")
    assert uses(GRPOTrainer._compute_loss, "current_gradient_accumulation_steps")


def test_the_globals_that_are_replaced_are_looked_up_by_these_names():
    assert uses(GRPOTrainer._prepare_inputs, "shuffle_sequence_dict")
    assert uses(GRPOTrainer.__init__, "VLLMGeneration")
    rows = {"group": torch.arange(16), "completion_ids": torch.arange(16)[:, None]}
    torch.manual_seed(0)
    shuffled = grpo_trainer.shuffle_sequence_dict(rows)  # takes and returns one dictionary
    assert shuffled.keys() == rows.keys()
    assert shuffled["group"].tolist() != rows["group"].tolist()


def test_further_keys_are_cut_into_micro_batches_with_the_rest():
    first, second = split_tensor_dict({"ids": torch.zeros(4, 2), "group": torch.arange(4)}, 2)
    assert (first["group"].tolist(), second["group"].tolist()) == ([0, 1], [2, 3])


def test_log_probs_entropies_and_router_loss_come_as_three(make_trainer):
    trainer = make_trainer(trainer=GRPOTrainer)
    takes = list(inspect.signature(trainer._get_per_token_logps_and_entropies).parameters)
    assert takes[:4] == ["model", "input_ids", "attention_mask", "logits_to_keep"]
    assert {"compute_entropy", "compute_aux_loss", "pixel_values", "image_grid_thw"} <= set(takes)
    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    log_probs, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, 3, compute_entropy=True, compute_aux_loss=False
    )
    logits = trainer.model(ids).logits[:, 2:-1].log_softmax(-1)
    expected = logits.gather(-1, ids[:, 3:, None])[..., 0]
    torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, -(logits.exp() * logits).sum(-1), rtol=1e-4, atol=1e-5)
    assert aux_loss is None


def test_rewards_and_rows_have_their_keys_and_shapes(make_trainer):
    trainer = make_trainer(trainer=GRPOTrainer)
    kept = {}
    inner = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *args: kept.setdefault("rewards", inner(*args))
    rows = next(iter(trainer.get_train_dataloader()))  # a list of rows for four micro-batches
    assert [row["prompt"] for row in rows[:4]] == [rows[0]["prompt"]] * 4
    output = trainer._generate_and_score_completions(rows)
    assert set(output) == KEYS
    assert kept["rewards"].shape == (len(rows), 1) == (32, 1)
    assert output["completion_mask"].shape == output["old_per_token_logps"].shape
    assert output["num_items_in_batch"].ndim == 0
    assert not {name for name in ATTRIBUTES if not hasattr(trainer, name)}
    assert set(trainer._metrics) == {"train", "eval"}
    assert isinstance(trainer._metrics["train"]["a new name"], list)


def test_one_optimizer_step_per_generation_has_no_old_log_probs(make_trainer):
    trainer = make_trainer(trainer=GRPOTrainer, steps_per_generation=1)
    output = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert set(output) == KEYS - {"old_per_token_logps"}


def test_the_settings_that_are_refused_exist():
    fields = GRPOConfig.__dataclass_fields__
    assert not {name for name in _UNUSED if name not in fields}
    assert (fields["beta"].default, fields["delta"].default) == (0.0, None)
    assert fields["mask_truncated_completions"].default is False


def test_vllm_is_built_and_synced_where_it_was():
    backend = grpo_trainer.VLLMGeneration
    assert list(inspect.signature(backend.sync_weights).parameters) == ["self"]
    assert {"model", "accelerator", "mode"} <= set(inspect.signature(backend.__init__).parameters)
    for name in ("model", "accelerator", "mode"):
        assert uses(backend.__init__, name)
    assert uses(backend.__init__, "_init_vllm")
    assert uses(backend._init_vllm, "llm")
    turn = inspect.unwrap(GRPOTrainer._generate_single_turn)
    assert uses(turn, "sync_weights")
    assert uses(turn, "_last_loaded_step")
