import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from llm_xrisk.data.gsm8k_steps import load_steps
from llm_xrisk.objectives import DisCO
from llm_xrisk.trl import DisCOGRPOConfig, DisCOGRPOTrainer


def odd_length(completions, **_):
    """Right and wrong answers to most questions, whatever the policy can do."""
    return [float(len(text) % 2) for text in completions]


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def micro_batches(trainer):
    """The micro-batches of one rollout."""
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    trainer._prepare_inputs(rows)
    return trainer._buffered_inputs


def reference_log_probs(model, batch, temperature=1.0):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    keep = batch["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[:, -keep:, None])[..., 0]


def test_a_run_moves_the_weights_and_logs_the_objective(make_trainer):
    trainer = make_trainer(odd_length)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    still = {n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])}
    assert not still
    kl = logged(trainer, "kl/k3")
    assert len(kl) == 5
    assert abs(kl[0]) < 1e-6  # the first update starts at the policy that generated
    assert all(value > 1e-6 for value in kl[1:4])
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    for name in ("entropy", "reward", "groups/valid_fraction", "completions/mean_length"):
        assert all(value > 0 for value in logged(trainer, name)), name


def test_loss_and_gradient_are_those_of_the_objective_on_the_same_rows(make_trainer):
    trainer = make_trainer(odd_length, tau=1.0, kl_penalty=5.0, temperature=0.7)
    batch = micro_batches(trainer)[0]
    old = reference_log_probs(trainer.model, batch, 0.7).detach()
    with torch.no_grad():  # another policy than the one that generated: the hinge acts
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
    trainer.current_gradient_accumulation_steps = 3
    trainer._compute_loss(trainer.model, batch).backward()
    loss = trainer._compute_loss(trainer.model, batch).item()
    gradients = [p.grad.clone() for p in trainer.model.parameters()]

    trainer.model.zero_grad()
    mask = batch["completion_mask"].bool()
    objective = DisCO(tau=1.0, kl_penalty=5.0)
    rewards = torch.tensor(
        odd_length(trainer.processing_class.batch_decode(batch["completion_ids"], True))
    )
    log_probs = reference_log_probs(trainer.model, batch, 0.7)
    output = objective(
        targets=rewards,
        group=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        length=mask.sum(-1).float(),
        **objective.row_scores(log_probs, mask, old, rewards),
    )
    (output.loss / 3).backward()
    assert output.metrics["kl/violated"] == 1
    assert 0 < rewards.sum() < 8
    assert loss == pytest.approx(output.loss.item() / 3, rel=1e-5)
    expected = [p.grad for p in trainer.model.parameters()]
    difference = sum((a - b).square().sum() for a, b in zip(gradients, expected, strict=True))
    assert (difference / sum(b.square().sum() for b in expected)).sqrt() < 1e-5


def test_evaluation_divides_nothing_and_logs_under_its_own_prefix(make_trainer):
    data = Dataset.from_list(load_steps("test")[:2])
    trainer = make_trainer(odd_length, eval_dataset=data, per_device_eval_batch_size=8)
    trainer.current_gradient_accumulation_steps = 7
    metrics = trainer.evaluate()
    (entry,) = [e for e in trainer.state.log_history if "eval_objective" in e]
    assert metrics["eval_loss"] == pytest.approx(entry["eval_objective"], rel=1e-4)
    assert entry["eval_kl/k3"] == pytest.approx(0.0, abs=1e-6)


def test_every_micro_batch_holds_whole_groups(make_trainer):
    batches = micro_batches(make_trainer(odd_length))
    assert len(batches) == 4
    for batch in batches:
        assert batch["group"].tolist() == sorted(batch["group"].tolist())
        assert batch["group"].unique(return_counts=True)[1].tolist() == [4, 4]
        for group in batch["group"].unique():
            prompts = batch["prompt_ids"][batch["group"] == group]
            assert torch.equal(prompts, prompts[:1].expand_as(prompts))


def test_grpo_itself_would_split_the_groups(make_trainer):
    batches = micro_batches(make_trainer(odd_length, trainer=GRPOTrainer))
    prompts = [batch["prompt_ids"].unique(dim=0, return_counts=True)[1] for batch in batches]
    assert any(counts.tolist() != [4, 4] for counts in prompts)


def test_the_targets_are_the_rewards_of_the_same_rows(make_trainer):
    trainer = make_trainer(odd_length)
    for batch in micro_batches(trainer):
        texts = trainer.processing_class.batch_decode(batch["completion_ids"], True)
        assert batch["targets"].tolist() == odd_length(texts)


def test_an_adapter_is_trained_alone(make_trainer):
    config = LoraConfig(r=4, target_modules="all-linear")
    trainer = make_trainer(odd_length, peft_config=config)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert all(value > 0 for value in logged(trainer, "kl/k3")[1:4])


def test_a_question_that_cannot_be_graded_leaves_the_objective(make_trainer):
    def reward(completions, **_):
        return [None, 1.0, 0.0, 1.0] + [1.0, 0.0] * (len(completions) // 2 - 2)

    batch = micro_batches(make_trainer(reward))[0]
    assert batch["targets"].tolist() == [0, 0, 0, 0, 1, 0, 1, 0]


def test_rewards_between_0_and_1_need_a_threshold(make_trainer):
    def reward(completions, **_):
        return [0.25, 0.5, 0.75, 1.0] * (len(completions) // 4)

    batch = micro_batches(make_trainer(reward, reward_threshold=0.5))[0]
    assert batch["targets"].tolist() == [0, 1, 1, 1] * 2
    with pytest.raises(ValueError, match=r"sum to 0.25.*need 0 or 1. Set reward_threshold"):
        micro_batches(make_trainer(reward))


def test_two_reward_functions_are_weighed_and_summed(make_trainer):
    def first(completions, **_):
        return [1.0, None] * (len(completions) // 2)

    def second(completions, **_):
        return [4.0, 2.0] * (len(completions) // 2)

    trainer = make_trainer([first, second], reward_weights=[-1.0, 0.5])
    assert micro_batches(trainer)[0]["targets"].tolist() == [1.0] * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 6}, r"=6 splits the 4 answers .* multiple of num_gen"),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"beta": 0.04}, r"beta must be 0, got 0.04: .* delta and kl_penalty"),
        ({"loss_type": "dapo"}, "got loss_type='dapo', but this trainer has one loss"),
        ({"delta": 4.0}, r"delta must be in \[0, 1\), got 4.0: .* not GRPOConfig's clipping"),
        ({"delta": None}, r"delta must be in \[0, 1\), got None"),
        ({"epsilon_high": 0.28}, "epsilon_high=0.28 is a setting of GRPO's losses"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True is a setting of GRPO's losses"),
        ({"mask_truncated_completions": True}, "completions without tokens, which have no score"),
    ],
)
def test_a_setting_without_effect_or_sense_is_refused(settings, options, message):
    with pytest.raises(ValueError, match=message):
        DisCOGRPOConfig(**(settings | options))


def test_grpos_config_is_refused(make_trainer, settings, tiny_model_path):
    with pytest.raises(TypeError, match="must be a DisCOGRPOConfig, got GRPOConfig"):
        DisCOGRPOTrainer(tiny_model_path, odd_length, GRPOConfig(**settings))


def test_a_score_that_does_not_exist_is_refused_before_the_model_is_loaded(settings):
    with pytest.raises(ValueError, match="score must be one of"):
        DisCOGRPOTrainer("nowhere", odd_length, DisCOGRPOConfig(score="logl", **settings))


@pytest.mark.parametrize(
    ("options", "dead"),
    [
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 2}, True),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 2, "kl_penalty": 0}, False),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 2, "num_iterations": 2}, False),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, False),
    ],
)
def test_a_hinge_that_can_never_act_is_warned_of(settings, options, dead, caplog):
    DisCOGRPOConfig(**(settings | options))
    assert ("the trust region never acts" in caplog.text) == dead
