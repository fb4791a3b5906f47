"""TempNetTrainer: gradients, layouts, memory, what it learns, joint training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from llm_xrisk.data.gsm8k_steps import tiny_model_path
from llm_xrisk.data.next_token_dataset import IGNORED, next_token_targets
from llm_xrisk.models import logprobs
from llm_xrisk.models.fixed_entropy import fixed_entropy_temperature
from llm_xrisk.models.tempnet import TempNet
from llm_xrisk.models.tempnet_loss import log_norms_and_entropy
from llm_xrisk.trainers import TempNetTrainer, TempNetTrainingConfig
from llm_xrisk.trainers.tempnet_model import TemperedModel, logits_of
from tests.models.tempnets import plain_loss, plain_temperature
from tests.trainers.build import COMMON, LORA, losses, pairs, tiny_model, tokenizer, weights
from tests.trainers.test_invariance import Gradient

V = 102
SETTINGS: dict[str, Any] = {
    "entropy": 1.0,
    "learning_rate": None,
    "tempnet_learning_rate": 0.5,
    "tempnet_dropout": 0.0,
    "tempnet_hidden_size": 16,
}


def trainer_of(
    output: Path | str,
    *,
    model: Any = None,
    rows: Any = None,
    eval_dataset: Any = None,
    peft_config: Any = None,
    callbacks: Any = None,
    **changes: Any,
) -> TempNetTrainer:
    """A trainer on gold answers; per step 8 rows in two micro-batches, without dropout."""
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings = COMMON | batches | SETTINGS | changes
    return TempNetTrainer(
        tiny_model() if model is None else model,
        TempNetTrainingConfig(output_dir=str(output), **settings),
        train_dataset=pairs() if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def batch_of(trainer: TempNetTrainer, count: int = 6) -> dict[str, Any]:
    return trainer.data_collator([trainer.train_dataset[k] for k in range(count)])  # type: ignore


def in_float64(folder: Path, **changes: Any) -> tuple[TempNetTrainer, dict[str, Any], Tensor]:
    """A trainer whose every number is float64, a batch, and the logits that it is about."""
    trainer = trainer_of(folder, **changes)
    trainer.model.double().train()
    model = trainer.model.language_model.double()
    with torch.no_grad():
        for parameter in trainer.net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    batch = batch_of(trainer)
    return trainer, batch, logits_of(model, inputs_of(batch), batch["keep"])


def inputs_of(batch: dict[str, Any]) -> dict[str, Tensor]:
    mask = batch["attention_mask"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
    return inputs | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def targets_of(batch: dict[str, Any]) -> Tensor:
    return next_token_targets(batch["input_ids"], batch["completion_mask"], batch["keep"])


def gradients(loss: Tensor, parameters: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(parameters), allow_unused=True))


# -- the loss and its gradient ---------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [1, 5 * V, 1 << 24], ids=["token by token", "5", "all"])
@pytest.mark.parametrize("path", ["from the head", "whole logits", "joint"])
def test_loss_and_gradient_are_those_of_the_formula(tmp_path, monkeypatch, path, numbers):
    monkeypatch.setattr(logprobs, "_CHUNK_NUMBERS", numbers)
    trainer, batch, logits = in_float64(tmp_path, train_model=path == "joint")
    if path == "whole logits":
        trainer.model._chunked = False
    found = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(50))
    own = gradients(found, trainer.net.parameters())
    tau = plain_temperature(trainer.net, logits)
    where = targets_of(batch) != IGNORED
    share = int(where.sum()) / 50
    wanted = plain_loss(logits, targets_of(batch), tau, trainer.net.config.rho) * share
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for one, other in zip(own, gradients(wanted, trainer.net.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert trainer.model._chunked == (path == "from the head")


def test_the_derivative_in_tau_is_rho_minus_log_v_plus_the_entropy(tmp_path):
    trainer, batch, logits = in_float64(tmp_path)
    own = gradients(trainer.compute_loss(trainer.model, batch), trainer.net.parameters())
    tau = plain_temperature(trainer.net, logits)
    entropy = log_norms_and_entropy(logits / tau.detach().unsqueeze(-1))[1]
    slope = trainer.net.config.rho - (torch.log(torch.tensor(V).double()) - entropy)
    where = targets_of(batch) != IGNORED
    identity = (slope.detach() * tau)[where].sum() / where.sum()
    for one, other in zip(own, gradients(identity, trainer.net.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert slope[where].abs().min() > 0.01


def test_the_model_learns_by_softmax_of_s_over_tau_minus_the_label(tmp_path):
    """The gradient of tau CE(s / tau, y) with tau held fast."""
    trainer, batch, logits = in_float64(tmp_path, train_model=True)
    parameters = list(trainer.model.language_model.parameters())
    found = gradients(trainer.compute_loss(trainer.model, batch, num_items_in_batch=40), parameters)
    tau = plain_temperature(trainer.net, logits).detach()
    targets = targets_of(batch)
    where = targets != IGNORED
    cross = torch.nn.functional.cross_entropy(
        (logits / tau.unsqueeze(-1))[where], targets[where], reduction="none"
    )
    for one, other in zip(
        found, gradients((tau[where] * cross).sum() / 40, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("train_model", [False, True])
def test_tokens_without_a_label_count_for_nothing(tmp_path, train_model):
    trainer = trainer_of(tmp_path, train_model=train_model)
    batch = batch_of(trainer)
    found = trainer.model.train()(**batch)
    assert found["tau"].shape == (int(batch["completion_mask"].sum()),)
    half = batch | {"completion_mask": batch["completion_mask"].clone()}
    half["completion_mask"][:3] = False
    other = trainer.model(**half)
    kept = int(half["completion_mask"].sum())
    torch.testing.assert_close(other["values"], found["values"][-kept:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other["total"], found["values"][-kept:].sum(), rtol=1e-5, atol=1e-6)
    nothing = batch | {"completion_mask": torch.zeros_like(batch["completion_mask"])}
    total = trainer.model(**nothing)["total"]
    assert total == 0
    assert all(not g.any() for g in gradients(total, trainer.net.parameters()) if g is not None)


@pytest.mark.parametrize("train_model", [False, True])
def test_loss_and_gradient_do_not_depend_on_the_layout(tmp_path, train_model):
    steps = []
    for size, side in ((8, "left"), (4, "left"), (2, "right"), (1, "left")):
        watch = Gradient()
        trainer = trainer_of(
            tmp_path,
            train_model=train_model,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            padding_side=side,
            callbacks=[watch],
            max_steps=1,
        )
        trainer.train()
        (line,) = (line for line in trainer.state.log_history if "loss" in line)
        means = [line[name] for name in ("nll", "entropy", "tau/mean", "tau/min", "tau/max")]
        steps.append((watch.value, losses(trainer), means))
    for gradient, loss, means in steps[1:]:
        torch.testing.assert_close(gradient, steps[0][0], rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx(steps[0][1], rel=1e-5)
        assert means == pytest.approx(steps[0][2], rel=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
def test_recomputed_activations_give_the_same_step(tmp_path, adapter):
    steps = []
    for recompute in (False, True):
        torch.manual_seed(0)
        watch = Gradient()
        trainer_of(
            tmp_path,
            train_model=True,
            gradient_checkpointing=recompute,
            peft_config=LoraConfig(**(LORA | {"init_lora_weights": False})) if adapter else None,
            callbacks=[watch],
            max_steps=1,
        ).train()
        steps.append(watch.value)
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-5, atol=1e-7)
    assert steps[0].abs().max() > 1e-3


# -- logits in chunks ------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
HEADS: dict[str, tuple[Any, bool]] = {
    "plain": (lambda: tiny_model(tie_word_embeddings=False), True),
    "tied": (tiny_model, True),
    "scaled by 1": (
        lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=1.0)),
        True,
    ),
    "scaled": (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)), False),
    "multiplied": (lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.1)), False),
    "soft-capped": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=3.0)),
        False,
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_logits_are_the_models_own_in_chunks_or_whole(tmp_path, monkeypatch, kind):
    """A head's product is computed in chunks; whatever a model does to it is not passed by."""
    monkeypatch.setattr(logprobs, "_CHUNK_NUMBERS", 5 * V)
    build, chunked = HEADS[kind]
    trainer = trainer_of(tmp_path, model=build())
    batch = batch_of(trainer)
    found = trainer.model.train()(**batch)
    own = gradients(found["total"], trainer.net.parameters())
    assert trainer.model._chunked == chunked
    with torch.no_grad():
        logits = trainer.model.language_model(**inputs_of(batch)).logits[:, -batch["keep"] - 1 :]
    whole = trainer.net.loss(logits, targets_of(batch), num_tokens=1)
    torch.testing.assert_close(found["total"], whole.loss, rtol=1e-6, atol=1e-6)
    for one, other in zip(own, gradients(whole.loss, trainer.net.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunked", [True, False])
def test_peak_memory_at_a_large_vocabulary_is_a_few_chunks(monkeypatch, chunked):
    """263 MB of logits never exist: by the profiler's record the step holds 38 MB at a time."""
    monkeypatch.setattr(logprobs, "_CHUNK_NUMBERS", 1 << 21)  # 8 MB
    vocab, rows, length = 32000, 8, 257
    config = LlamaConfig(**(SMALL | {"vocab_size": vocab}))
    net = TempNet(vocab, hidden_size=16)
    tempered = TemperedModel(LlamaForCausalLM(config), net, train_model=False).train()
    tempered._chunked = chunked
    ids = torch.randint(vocab, (rows, length))
    labelled = torch.ones_like(ids).bool()
    labelled[:, 0] = False
    with torch.profiler.profile(profile_memory=True) as profile:
        tempered(ids, torch.ones_like(ids), labelled, length - 1)["total"].backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    logits = rows * length * vocab * 4
    assert (peak < 0.2 * logits) if chunked else (peak > logits)


@pytest.mark.parametrize("how", [{"bf16": True}, {"model": tiny_model().to(torch.bfloat16)}])
def test_a_model_in_bfloat16_gives_a_tempnet_in_float32(tmp_path, how):
    trainer = trainer_of(tmp_path, max_steps=1, **how)
    plain = trainer_of(tmp_path, max_steps=1)
    for run in (trainer, plain):
        run.train()
    assert trainer.model._chunked
    assert {p.dtype for p in trainer.net.parameters()} == {torch.float32}
    assert losses(trainer) == pytest.approx(losses(plain), rel=5e-3)
    assert losses(trainer) != losses(plain)


# -- what is learned -------------------------------------------------------------------------------


def test_temperatures_move_to_those_of_the_entropy_that_is_asked_for(tmp_path):
    """Nearer than one temperature for all tokens comes, and higher where the model is surer."""
    trainer = trainer_of(
        tmp_path,
        model=tiny_model_path(),
        rows=pairs(96),
        per_device_train_batch_size=24,
        gradient_accumulation_steps=1,
        max_steps=80,
        optim="adamw_torch",
        tempnet_learning_rate=0.03,
        tempnet_hidden_size=64,
    )
    batch = batch_of(trainer, 96)
    with torch.no_grad():
        logits = logits_of(trainer.model.language_model, inputs_of(batch), batch["keep"])
    logits = logits[targets_of(batch) != IGNORED]
    best = fixed_entropy_temperature(logits, 1.0)
    one_for_all = float((best.log() - best.log().median()).abs().mean())

    def found() -> tuple[float, float]:
        with torch.no_grad():
            tau = trainer.net.eval()(logits)
        distance = float((tau / best).log().abs().mean())
        return distance, float(torch.corrcoef(torch.stack([tau, best]))[0, 1])

    before = found()
    trainer.train()
    after = found()
    assert before[0] > 0.9 * one_for_all and before[1] < 0
    assert after[0] < 0.7 * one_for_all and after[1] > 0.8


def test_a_frozen_model_stays_as_it_is_and_the_optimizer_knows_the_tempnet_alone(tmp_path):
    model = tiny_model(attention_dropout=0.5).train()
    before = weights(model).clone()
    trainer = trainer_of(tmp_path, model=model)
    start = weights(trainer.net).clone()
    trainer.train()
    assert torch.equal(weights(model), before)
    assert not model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}  # type: ignore
    assert held == {id(p) for p in trainer.net.parameters()}
    assert not torch.equal(weights(trainer.net), start)


@pytest.mark.parametrize("adapter", [False, True])
def test_joint_training_moves_both_at_their_own_learning_rates(tmp_path, adapter):
    """One step of SGD moves a parameter by its rate times its gradient."""
    watch = Gradient()
    trainer = trainer_of(
        tmp_path,
        train_model=True,
        learning_rate=0.25,
        tempnet_learning_rate=0.5,
        max_steps=1,
        peft_config=LoraConfig(**LORA) if adapter else None,
        callbacks=[watch],
    )
    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in named.items()}
    trainer.train()
    sizes = [p.numel() for p in named.values()]
    for (name, start), gradient in zip(before.items(), watch.value.split(sizes), strict=True):
        rate = 0.5 if name.startswith("losses.") else 0.25
        moved = start.flatten() - named[name].detach().flatten()
        torch.testing.assert_close(moved, rate * gradient, rtol=1e-3, atol=1e-6)
    moved = {n.split(".")[0] for n, p in named.items() if not torch.equal(p.detach(), before[n])}
    assert moved == {"losses", "model"}


# -- what is logged --------------------------------------------------------------------------------


def test_what_is_logged_is_what_the_tokens_have(tmp_path):
    trainer = trainer_of(tmp_path, per_device_train_batch_size=24, gradient_accumulation_steps=1)
    batch = batch_of(trainer, 24)
    with torch.no_grad():
        found = trainer.model.train()(**batch)
    trainer.args.max_steps = 1
    trainer.train()
    line = trainer.state.log_history[0]
    tau, rho = found["tau"], trainer.net.config.rho
    nll = found["values"] / tau + torch.log(torch.tensor(V)) - rho
    wanted = {
        "loss": found["values"].mean(),
        "nll": nll.mean(),
        "entropy": found["entropy"].mean(),
        "tau/mean": tau.mean(),
        "tau/min": tau.min(),
        "tau/max": tau.max(),
    }
    assert {name: line[name] for name in wanted} == pytest.approx(
        {name: float(value) for name, value in wanted.items()}, rel=1e-5
    )
    assert line["entropy/target"] == pytest.approx(1.0)


def test_evaluation_is_a_mean_over_tokens_without_dropout(tmp_path):
    options = {"tempnet_dropout": 0.5, "per_device_eval_batch_size": 3}  # 3 and 2 rows
    trainer = trainer_of(tmp_path, eval_dataset=pairs(5), **options)
    one, other = trainer.evaluate(), trainer.evaluate()
    rows = [trainer.eval_dataset[k] for k in range(5)]  # type: ignore
    with torch.no_grad():
        found = trainer.model.eval()(**trainer.data_collator(rows))
    assert one["eval_loss"] == other["eval_loss"]
    assert one["eval_loss"] == pytest.approx(float(found["values"].mean()), rel=1e-5)
    assert one["eval_tau/mean"] == pytest.approx(float(found["tau"].mean()), rel=1e-5)
    torch.manual_seed(0)
    trainer.model.train()
    drawn = [trainer.model(**trainer.data_collator(rows))["tau"] for _ in range(2)]
    assert not torch.equal(*drawn)
