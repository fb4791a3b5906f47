"""TempNetTrainer: what it saves, resumes from, warns of and refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DummyOptim
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LogitsProcessorList

from llm_xrisk.data.gsm8k_steps import tiny_model_path
from llm_xrisk.models.tempnet import CONFIG_NAME, WEIGHTS_NAME, TempNet, TempNetConfig
from llm_xrisk.serving.temperature_processor import TempNetLogitsProcessor
from llm_xrisk.trainers import DFTConfig, TempNetTrainer, TempNetTrainingConfig
from tests.trainers.build import LORA, logged, losses, pairs, tiny_model, tokenizer
from tests.trainers.test_resume import assert_equal, tensors_of
from tests.trainers.test_tempnet_trainer import V, trainer_of

KINDS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "joint": {"train_model": True, "learning_rate": 0.01},
    "adapter": {"train_model": True, "learning_rate": 0.01},
}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has a name."""
    path = tmp_path_factory.mktemp("named")
    tiny_model().save_pretrained(path)
    return str(path)


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_interrupted(tmp_path, kind):
    def build(folder: Path) -> TempNetTrainer:
        torch.manual_seed(0)
        return trainer_of(
            folder,
            **KINDS[kind],
            peft_config=LoraConfig(**LORA, lora_dropout=0.1) if kind == "adapter" else None,
            tempnet_dropout=0.5,
            disable_dropout=False,
            optim="adamw_torch",
            lr_scheduler_type="cosine",
            tempnet_learning_rate=0.02,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
        )

    whole = build(tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    resumed = build(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == 6
    assert_equal(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    one, other = (tensors_of(run.optimizer.state_dict()) for run in (resumed, whole))
    assert any("exp_avg" in key for key in one)
    assert_equal(one, other)
    assert logged(resumed, "tau/mean") == logged(whole, "tau/mean")
    paths = [tmp_path / run / "checkpoint-6" / "rng_state.pth" for run in ("whole", "cut")]
    states = [torch.load(path, weights_only=False) for path in paths]
    assert torch.equal(states[0]["cpu"], states[1]["cpu"])


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = trainer_of(tmp_path, eval_dataset=pairs(5), **saving, **best)
    trainer.train()
    saved = TempNet.from_pretrained(str(trainer.state.best_model_checkpoint))
    assert_equal(dict(trainer.net.state_dict()), dict(saved.state_dict()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(logged(trainer, "eval_loss")))


def test_a_checkpoint_that_training_cannot_go_on_from_is_refused(tmp_path):
    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, **saving, save_only_model=True).train()
    with pytest.raises(FileNotFoundError, match=r"has no optimizer\.pt"):
        trainer_of(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="resume with the settings the run started with"):
        trainer_of(tmp_path, tau_max=3.0).train(resume_from_checkpoint=True)


# -- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_base", [None, True, False])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_frozen_model_is_saved_where_its_name_does_not_lead_to_it(
    tmp_path, named, by_name, save_base
):
    model = AutoModelForCausalLM.from_pretrained(named)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(
        tmp_path,
        model=named if by_name else model,
        save_base=save_base,
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.save_model()
    expected = not by_name if save_base is None else save_base
    assert ("model.safetensors" in names_in(tmp_path)) == expected
    assert {CONFIG_NAME, WEIGHTS_NAME, "tokenizer.json", "README.md"} <= names_in(tmp_path)
    assert not {"config.json", "README.md"} & names_in(tmp_path / "checkpoint-1")
    saved = TempNet.from_pretrained(tmp_path)
    assert saved.config.base_model == named
    assert_equal(dict(saved.state_dict()), dict(trainer.net.state_dict()))
    if expected:
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_equal(dict(again.state_dict()), before)
        assert again.config.use_cache == model.config.use_cache


@pytest.mark.parametrize("kind", ["joint", "adapter"])
def test_a_model_that_was_trained_too_is_saved_beside_its_tempnet(tmp_path, named, kind):
    peft = LoraConfig(**LORA) if kind == "adapter" else None
    trainer = trainer_of(tmp_path, model=named, peft_config=peft, **KINDS[kind])
    trainer.train()
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # peft puts the adapter on
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = trainer.model.language_model.eval()(ids).logits
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)
    saved = TempNet.from_pretrained(tmp_path)
    assert_equal(dict(saved.state_dict()), dict(trainer.net.state_dict()))
    head = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert head["library_name"] == ("peft" if kind == "adapter" else "transformers")


def test_the_result_generates(tmp_path):
    trainer = trainer_of(tmp_path, model=tiny_model_path(), max_steps=2)
    trainer.train()
    trainer.save_model()
    processor = TempNetLogitsProcessor.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(str(processor.net.config.base_model))
    ids = torch.tensor([tokenizer()("8/2=")["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
        torch.testing.assert_close(processor.temperature(logits), trainer.net.eval()(logits))
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True}
    generated = model.generate(
        ids, do_sample=True, top_k=0, logits_processor=LogitsProcessorList([processor]), **options
    )
    tau = processor.temperature(logits)
    torch.testing.assert_close(generated.scores[0], logits / tau.unsqueeze(-1))
    assert generated.sequences.shape[1] > ids.shape[1]


def test_training_goes_on_from_a_saved_tempnet(tmp_path):
    first = trainer_of(tmp_path / "first", max_steps=2)
    first.train()
    first.save_model()
    own = {"tempnet_hidden_size": None, "tempnet_dropout": None}
    again = trainer_of(tmp_path / "again", tempnet=str(tmp_path / "first"), **own, entropy=0.5)
    assert_equal(dict(again.net.state_dict()), dict(first.net.state_dict()))
    assert again.net.config.rho == pytest.approx(math.log(V) - 0.5)
    kept = trainer_of(tmp_path / "kept", tempnet=str(tmp_path / "first"), **own, entropy=None)
    assert kept.net.config.rho == first.net.config.rho


def test_the_card_says_by_what_and_from_what_it_was_made(tmp_path, named):
    trainer = trainer_of(tmp_path / "mine", model=named, max_steps=1)
    trainer.create_model_card(dataset="a/b")
    card = (tmp_path / "mine" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["tags"] == ["llm-xrisk", "tempnet"] and head["library_name"] == "llm-xrisk"
    labels = sum(len(row["completion_ids"]) for row in trainer.train_dataset)  # type: ignore
    for line in (
        "| entropy | 1.0 |",
        "datasets: a/b",
        "24 rows with",
        f"; {labels} tokens with a label.",
    ):
        assert line in card
    assert f"`{Path(named).name}`, trained by TempNet" in card and named not in card


# -- warnings --------------------------------------------------------------------------------------


def test_temperatures_that_collapse_are_told_of_once(tmp_path, caplog):
    trainer = trainer_of(tmp_path, max_steps=12, entropy=1e-3, tau_min=0.9, tempnet_learning_rate=5)
    trainer.train()
    assert logged(trainer, "tau/at_lower")[-1] > 0.9
    assert caplog.text.count("of the temperatures sit at their lower bound") == 1


@pytest.mark.parametrize(("entropy", "told"), [(1.0, 0), (2.5, 1)])
def test_an_entropy_of_more_than_half_the_largest_is_told_of(tmp_path, caplog, entropy, told):
    trainer_of(tmp_path, entropy=entropy)
    assert caplog.text.count("close to random text") == told


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 1.0, "entropy": 1.0}, "got rho=1.0 and entropy=1.0; give one of them"),
        ({}, "got rho=None and entropy=None; give one of them"),
        ({"rho": 1.0, "learning_rate": 0.1}, "frozen language model; set tempnet_learning_rate"),
        ({"rho": 1.0, "max_length": 1}, "max_length >= 2"),
        ({"rho": 1.0, "tempnet_learning_rate": 0.0}, "tempnet_learning_rate > 0"),
        ({"tempnet": "folder", "tau_min": 0.1}, "got tau_min and the TempNet in folder"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        TempNetTrainingConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 4.7, "entropy": None}, r"rho must be in \[0, log V\), got 4.7"),
        ({"entropy": 4.7}, r"entropy must be in \(0, log V\], got 4.7 nats with log V = 4.625"),
        ({"tau_min": 3.0}, "tau_min=3.0, tau_max=2.0"),
        ({"tempnet_dropout": 1.0}, "dropout"),
    ],
)
def test_what_does_not_fit_the_vocabulary_is_refused_before_the_model_loads(
    tmp_path, named, settings, message
):
    shutil.copy(Path(named) / "config.json", tmp_path)  # there are no weights
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path / "out", model=str(tmp_path), **settings)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path / "out", **settings)


def test_a_tempnet_that_is_not_there_or_for_another_vocabulary_is_refused(tmp_path, named):
    own = {"tempnet": str(tmp_path), "tempnet_hidden_size": None, "tempnet_dropout": None}
    with pytest.raises(FileNotFoundError, match=f"has no {CONFIG_NAME}"):
        trainer_of(tmp_path / "out", model=named, **own)
    TempNet(17, rho=1.0, hidden_size=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocabulary of 17, the model has 102"):
        trainer_of(tmp_path / "out", model=named, **own)


def test_logits_that_are_nan_end_the_run(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(ValueError, match="TempNet met NaN: the logits"):
        trainer_of(tmp_path, model=model).train()
    with pytest.raises(ValueError, match="the loss is NaN at step 0"):
        trainer_of(tmp_path).log({"loss": math.nan})  # where reading values has to wait


def test_what_has_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got a peft_config and a frozen language model"):
        trainer_of(tmp_path, peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="got no train_dataset"):
        TempNetTrainer(
            tiny_model(),
            TempNetTrainingConfig(output_dir=str(tmp_path), entropy=1.0, use_cpu=True),
            processing_class=tokenizer(),
        ).train()
    with pytest.raises(ValueError, match="needs a TempNetTrainingConfig"):
        TempNetTrainer(tiny_model(), DFTConfig(output_dir=str(tmp_path)))  # type: ignore
    trainer = trainer_of(tmp_path, train_model=True)
    trainer.optimizer = DummyOptim(trainer.model.parameters())  # type: ignore
    with pytest.raises(ValueError, match="an optimizer in DeepSpeed's config"):
        trainer.create_optimizer()


def test_a_frozen_model_may_have_an_adapter_of_its_own(tmp_path):
    torch.manual_seed(0)
    options: Any = LORA | {"init_lora_weights": False}
    trainer = trainer_of(tmp_path, model=get_peft_model(tiny_model(), LoraConfig(**options)))
    plain = trainer_of(tmp_path)
    trainer.train()
    plain.train()
    assert trainer.model._chunked
    assert losses(trainer)[0] != pytest.approx(losses(plain)[0], rel=1e-4)
    trainer.save_model()
    assert {"adapter_model.safetensors", CONFIG_NAME} <= names_in(tmp_path)


def test_a_config_without_the_name_of_a_model_is_read_too(tmp_path):
    TempNet(17, rho=1.0, hidden_size=8).save_pretrained(tmp_path)
    found = json.loads((tmp_path / CONFIG_NAME).read_text())
    del found["base_model"]  # as it was written before there was one
    (tmp_path / CONFIG_NAME).write_text(json.dumps(found))
    assert TempNetConfig.from_pretrained(tmp_path).base_model is None
