"""The card that a saved model comes with."""

import pytest
import yaml
from peft import LoraConfig

from llm_xrisk.trainers import RolloutConfig
from llm_xrisk.trainers.card import own_settings
from tests.trainers.build import LORA, dft_config, dft_trainer, disco_trainer


def head_of(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_a_saved_model_says_how_it_was_made(tmp_path):
    trainer = dft_trainer(tmp_path / "calc", gamma=0.7, objective="DFT2")
    trainer.save_model()
    card = (tmp_path / "calc" / "README.md").read_text()
    assert head_of(card)["tags"] == ["llm-xrisk", "discriminative-fine-tuning"]
    assert "objective DFT2" in card and "2502.18679" in card
    assert "| gamma | 0.7 |" in card and "| learning_rate | 0.1 |" in card
    assert "weight_decay" not in card


def test_the_card_of_disco_has_the_rollouts(tmp_path):
    disco_trainer(tmp_path).create_model_card(model_name="mine", tags="arithmetic", dataset="a/b")
    card = (tmp_path / "README.md").read_text()
    assert "# mine\n" in card and "| num_generations |" in card and "| delta |" in card
    head = head_of(card)
    assert head["tags"] == ["llm-xrisk", "disco", "arithmetic"]
    assert head["datasets"] == "a/b" and head["library_name"] == "transformers"


def test_the_card_of_an_adapter_replaces_the_template(tmp_path):
    dft_trainer(tmp_path, peft_config=LoraConfig(**LORA)).save_model()
    card = (tmp_path / "README.md").read_text()
    assert head_of(card)["library_name"] == "peft"
    assert "More Information Needed" not in card


def test_a_card_written_by_hand_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# my project\n")
    trainer = dft_trainer(tmp_path)
    trainer.save_model()
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == "# my project\n"


def test_checkpoints_carry_no_card(tmp_path):
    dft_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    assert not list(tmp_path.rglob("README.md"))


def test_a_card_keeps_access_tokens_and_paths_to_itself(tmp_path):
    hidden = {"model_init_kwargs": {"token": "secret"}, "resume_from_checkpoint": "/home/me/c-1"}
    args = dft_config(tmp_path, **hidden)
    settings = own_settings(args, RolloutConfig(vllm_kwargs='{"model": "/home/me"}'))
    assert not {*hidden, "vllm_kwargs", "output_dir"} & set(settings)


@pytest.mark.parametrize(("base", "shown"), [("a/b", "`a/b`"), ("/models/mine", "`mine`")])
def test_only_a_name_of_the_hub_becomes_the_base_model(tmp_path, base, shown):
    disco_trainer(tmp_path).create_model_card(finetuned_from=base)
    card = (tmp_path / "README.md").read_text()
    assert shown in card and "/models" not in card
    assert head_of(card).get("base_model") == ("a/b" if base == "a/b" else None)
