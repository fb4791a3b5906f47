from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from llm_xrisk.data.gsm8k_steps import is_correct
from llm_xrisk.data.synthetic_steps import StepSampler
from llm_xrisk.data.tiny_calculator import char_tokenizer, untrained_calculator
from recipes.make_base_model import ScriptArguments, main, make_batch, train, with_interval

YAML = Path(__file__).parents[2] / "recipes" / "make_base_model.yaml"


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_yaml_holds_the_settings_of_the_shipped_model() -> None:
    (args,) = TrlParser(ScriptArguments).parse_args_and_config(["--config", str(YAML)])
    assert args == ScriptArguments(output_dir="llm_xrisk/assets/tiny-calculator")


def test_the_loss_is_on_the_answer_and_its_end() -> None:
    tokenizer = char_tokenizer()
    sampler = StepSampler(["48/2=", "3+15="], excluded=[], wrong_rate=0.0)
    batch = make_batch(sampler, tokenizer, ScriptArguments("out", batch_size=4), step=1)
    for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        prompt, _, rest = tokenizer.decode(tokens).partition("=")
        learnt = tokenizer.decode(labels[labels != -100])
        assert learnt == rest.split("<|pad|>")[0]
        assert is_correct(prompt + "=", learnt.removesuffix("<|end|>"))


def test_an_interrupted_run_resumes_to_the_same_weights() -> None:
    args = ScriptArguments("out", max_steps=4, batch_size=4, save_steps=3)
    tokenizer = char_tokenizer()
    whole, resumed = untrained_calculator(tokenizer), untrained_calculator(tokenizer)
    with Progress(disable=True) as bar:
        train(whole, tokenizer, args, bar)
        train(resumed, tokenizer, args, bar)
        assert bar.tasks[1].completed == 4
    for first, second in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_checkpoint_of_other_settings_is_not_resumed() -> None:
    args = ScriptArguments("out", max_steps=2, batch_size=4, save_steps=2)
    tokenizer = char_tokenizer()
    model = untrained_calculator(tokenizer)
    with Progress(disable=True) as bar:
        train(model, tokenizer, args, bar)
        before = model.lm_head.weight.detach().clone()
        train(model, tokenizer, ScriptArguments("out", max_steps=2, batch_size=4, seed=1), bar)
    assert not torch.equal(model.lm_head.weight, before)


def test_the_interval_is_that_of_the_mean_over_prompts() -> None:
    correct = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    half_width = 1.96 * (2 * 0.25 / 3) ** 0.5 / 4**0.5
    assert with_interval(correct) == f"50.0 ± {100 * half_width:.1f} %"


def test_the_recipe_leaves_a_model_that_loads_and_a_card_with_numbers(tmp_path: Path) -> None:
    args = ScriptArguments(str(tmp_path / "out"), max_steps=2, batch_size=4, num_samples=1)
    main(args)
    assert AutoModelForCausalLM.from_pretrained(args.output_dir).num_parameters() == 866_432
    assert len(AutoTokenizer.from_pretrained(args.output_dir)) == 102
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| greedy | 0." in card
    assert "{" not in card
