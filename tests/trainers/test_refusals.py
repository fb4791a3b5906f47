"""Bad input: every message says what was got, what is needed and what to do."""

import logging
import shutil

import pytest
import torch
from trl import GRPOConfig, SFTConfig

from llm_xrisk.objectives import DFT2
from llm_xrisk.trainers import DFTConfig, DisCOConfig, RolloutConfig
from llm_xrisk.trainers.checkpoint import last_complete_checkpoint, load_objective, save_objective
from reward import arithmetic_reward
from tests.trainers.build import (
    dft_trainer,
    disco_trainer,
    even_code,
    pairs,
    questions,
    tiny_model,
)

WARNINGS = "llm_xrisk.trainers"


def message(error, function, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def says(text: str, *, got: str, need: str, do: str) -> None:
    assert got in text
    assert need in text
    assert do in text


def without(rows: list[dict], name: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key != name} for row in rows]


def test_rows_without_an_index(tmp_path):
    text = message(ValueError, dft_trainer, tmp_path, rows=without(pairs(8), "index"))
    says(
        text,
        got="columns ['completion', 'negatives', 'prompt']",
        need="no `index`, by which DFT keeps a value for each prompt",
        do="dataset = llm_xrisk.data.with_index(dataset)",
    )


def test_an_index_beyond_the_data_set(tmp_path):
    rows = pairs(8)
    rows[3]["index"] = 20480
    text = message(IndexError, dft_trainer, tmp_path, rows=rows)
    says(text, got="20480", need="out of range for num_samples=8", do="with_index")


def test_an_empty_completion(tmp_path):
    rows = pairs(8)
    rows[2]["negatives"] = ["7", ""]
    text = message(ValueError, dft_trainer, tmp_path, rows=rows)
    says(text, got="empty completion ''", need="at least one token", do="filter such rows out")


def test_a_question_without_a_gold_answer(tmp_path):
    text = message(ValueError, dft_trainer, tmp_path, rows=without(pairs(8), "completion"))
    says(
        text, got="index 0 has no gold answer", need="give `completion`", do="leave such questions"
    )


def test_a_reward_function_without_its_gold_column(tmp_path):
    rows = without(questions(8), "answer")
    text = message(ValueError, disco_trainer, tmp_path, rows=rows, reward=arithmetic_reward)
    says(
        text,
        got="columns ['index', 'prompt']",
        need="arithmetic_reward asks for ['answer']",
        do="give every question its gold answer in such a column",
    )


def test_data_without_a_usable_negative(tmp_path):
    rows = [row | {"negatives": []} for row in pairs(8)]
    text = message(ValueError, dft_trainer, tmp_path, rows=rows)
    says(text, got="none of the 8 prompts", need="usable negative", do="build a pool")


@pytest.mark.parametrize("trainer", [dft_trainer, disco_trainer])
def test_a_loss_type_of_trl(tmp_path, trainer):
    text = message(ValueError, trainer, tmp_path, loss_type="dft")
    says(
        text, got="loss_type='dft'", need="Dynamic Fine-Tuning, another method", do="Drop loss_type"
    )


@pytest.mark.parametrize("trainer", ["dft", "disco"])
def test_settings_of_a_trl_trainer(tmp_path, trainer):
    from llm_xrisk.trainers import DFTTrainer, DisCOTrainer

    common = {"output_dir": str(tmp_path), "report_to": [], "bf16": False, "use_cpu": True}
    if trainer == "dft":
        args = SFTConfig(loss_type="dft", **common)
        text = message(ValueError, DFTTrainer, tiny_model(), args, train_dataset=pairs(8))
        kind = "DFTConfig"
    else:
        args = GRPOConfig(**common)
        text = message(ValueError, DisCOTrainer, tiny_model(), args, reward_funcs=even_code)
        kind = "DisCOConfig"
    says(
        text,
        got=f"{type(args).__name__} (loss_type={args.loss_type!r})",
        need=f"needs a {kind}",
        do=f"build a {kind}",
    )


def half(completions, **columns):
    return [0.5] * len(completions)


def test_a_reward_between_right_and_wrong(tmp_path):
    text = message(ValueError, disco_trainer(tmp_path, reward=half).train)
    says(text, got="sum to 0.5", need="need 0 or 1", do="Set reward_threshold")


def test_a_reward_function_that_returns_another_number_of_rewards(tmp_path):
    def short(completions, **columns):
        return [1.0]

    text = message(ValueError, disco_trainer(tmp_path, reward=short).train)
    says(
        text,
        got="short returned 1 rewards for 32 completions",
        need="one per completion",
        do="None where the question cannot be graded",
    )


def test_a_prompt_that_is_too_long(tmp_path):
    text = message(ValueError, disco_trainer(tmp_path, max_prompt_length=2).train)
    says(text, got="tokens", need="max_prompt_length is 2", do="raise it or leave long prompts out")


def test_a_step_that_splits_the_answers_to_a_question(tmp_path):
    text = message(ValueError, disco_trainer, tmp_path, per_device_train_batch_size=3)
    says(
        text,
        got="per_device_train_batch_size x gradient_accumulation_steps = 6",
        need="multiple of num_generations=4",
        do="change one of them",
    )


def test_evaluation_without_questions(tmp_path):
    text = message(ValueError, disco_trainer(tmp_path).evaluate)
    says(text, got="got no eval_dataset", need="needs questions", do="evaluate(dataset)")


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"objective": "SFT"}, "'SFT'"),
        ({"num_negatives": -1}, "-1"),
        ({"padding_side": "middle"}, "'middle'"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "True"),
        ({"gamma": 1.5}, "1.5"),
        ({"tau": 0.0}, "0.0"),
    ],
)
def test_settings_of_dft_out_of_range(tmp_path, settings, got):
    assert got in message(ValueError, dft_trainer, tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"num_generations": 1},
        {"updates_per_rollout": 0},
        {"refill_tokens": -1},
        {"top_p": 0.0},
    ],
)
def test_settings_of_rollouts_out_of_range(settings):
    ((name, value),) = settings.items()
    text = message(ValueError, RolloutConfig, **settings)
    assert name in text
    assert f"{value:g}" in text


def test_an_unknown_objective_of_disco(tmp_path):
    text = message(ValueError, disco_trainer, tmp_path, objective="PPO")
    says(text, got="'PPO'", need="must be DisCO", do="GRPO")


# -- warnings ------------------------------------------------------------------------------------


def warned(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith(WARNINGS)]


def test_a_temperature_that_weighs_all_negatives_alike_warns_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    dft_trainer(tmp_path, tau=1e6, objective="DFT2", max_steps=8).train()
    (text,) = warned(caplog)
    says(text, got="is 1.0000 (1 is uniform)", need="weights do nothing", do="lower tau")


@pytest.mark.parametrize(
    "settings",
    [
        {"tau": 0.1, "objective": "DFT2"},
        {"max_steps": 4},  # DFT's weights are uniform where the policy is still the reference
        {"num_negatives": 1, "tau": 1e6, "objective": "DFT2"},  # one negative has all the weight
    ],
)
def test_weights_that_work_or_cannot_do_not_warn(tmp_path, caplog, settings):
    dft_trainer(tmp_path, **({"max_steps": 8} | settings)).train()
    assert warned(caplog) == []


def test_one_update_per_rollout_warns_that_the_hinge_is_dead(tmp_path, caplog):
    disco_trainer(tmp_path, rollout={"updates_per_rollout": 1})
    (text,) = warned(caplog)
    says(text, got="updates_per_rollout=1", need="trust region never acts", do="use 2 or more")


def test_one_update_per_rollout_is_fine_without_a_hinge(tmp_path, caplog):
    disco_trainer(tmp_path, rollout={"updates_per_rollout": 1}, kl_penalty=0.0)
    assert warned(caplog) == []


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run")
    dft_trainer(folder, max_steps=2, save_strategy="steps", save_steps=1).train()
    return folder


def test_a_checkpoint_without_the_state_of_the_estimator(run, tmp_path):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", folder)
    (folder / "objective.safetensors").unlink()
    trainer = dft_trainer(tmp_path)
    text = message(FileNotFoundError, trainer.train, resume_from_checkpoint=str(folder))
    says(
        text,
        got="has no objective.safetensors",
        need="tracked values would start anew",
        do="saved without save_only_model, or start a new run",
    )


def test_a_checkpoint_of_another_number_of_samples(run, tmp_path):
    trainer = dft_trainer(tmp_path, rows=pairs(16), max_steps=4)
    text = message(ValueError, trainer.train, resume_from_checkpoint=str(run / "checkpoint-2"))
    says(
        text,
        got="num_samples=24",
        need="this objective has num_samples=16",
        do="resume with the dataset the run started with",
    )


def test_a_checkpoint_of_another_objective(run, tmp_path):
    trainer = dft_trainer(tmp_path, objective="DFT2", max_steps=4)
    text = message(ValueError, trainer.train, resume_from_checkpoint=str(run / "checkpoint-2"))
    says(text, got="the state of DFT,", need="trains DFT2", do="resume with the settings")


def test_a_checkpoint_of_another_trainer(run, tmp_path):
    save_objective(DFT2(3), str(tmp_path))
    with pytest.raises(ValueError, match="holds the state of DFT2"):
        load_objective(torch.nn.Linear(1, 1), str(tmp_path))
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    trainer = disco_trainer(tmp_path)
    checkpoint = str(tmp_path / "checkpoint-2")
    text = message(ValueError, trainer.train, resume_from_checkpoint=checkpoint)
    says(text, got="the state of DFT,", need="trains DisCO", do="resume with the settings")


def test_a_disco_checkpoint_without_its_rollouts(tmp_path):
    disco_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-1" / "rollouts-0.safetensors").unlink()
    trainer = disco_trainer(tmp_path, max_steps=2)
    text = message(FileNotFoundError, trainer.train, resume_from_checkpoint=True)
    says(
        text, got="no rollouts-0.safetensors", need="not a checkpoint of this", do="start a new run"
    )


def test_resuming_where_nothing_was_saved(tmp_path):
    text = message(ValueError, dft_trainer(tmp_path).train, resume_from_checkpoint=True)
    says(
        text,
        got=f"no complete checkpoint in {tmp_path}",
        need="",
        do="leave resume_from_checkpoint",
    )


def test_a_run_that_stops_on_an_error_leaves_the_last_checkpoint_whole(tmp_path):
    calls: list[int] = []

    def breaks_down(completions, **columns):
        calls.append(len(completions))
        return half(completions) if len(calls) == 3 else even_code(completions)

    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    message(ValueError, disco_trainer(tmp_path, reward=breaks_down, **settings).train)
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    resumed = disco_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    whole = disco_trainer(tmp_path / "whole", **(settings | {"save_strategy": "no"}))
    whole.train()
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_configurations_explain_every_setting():
    from dataclasses import fields

    own = {f.name for kind in (DFTConfig, DisCOConfig) for f in fields(kind)}
    assert {"tau", "gamma", "delta"} <= own
    for kind in (DFTConfig, DisCOConfig, RolloutConfig):
        assert not [f.name for f in fields(kind) if not f.metadata.get("help")]
