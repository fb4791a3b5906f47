"""Evaluations in a model's card: the Hub's metadata, a table with intervals, what stays."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llm_xrisk.cli_help import RecipeParser
from llm_xrisk.data.load import load_rows
from llm_xrisk.evaluation.pass_at_k import Evaluation
from llm_xrisk.rollout.engine import SamplingConfig
from llm_xrisk.trainers.card import add_evaluation, described
from recipes.evaluate import ScriptArguments, main
from tests.trainers.build import dft_trainer, disco_trainer, pairs, questions

RUN = Evaluation(
    "policy",
    sample_ids=list(range(8)),
    num_generations=4,
    correct=[4, 4, 4, 4, 2, 2, 0, 0],
    mean_lengths=[3.0] * 8,
    truncated=[0] * 8,
    greedy_correct=[1, 1, 1, 1, 1, 0, 0, 0],
    ks=[1, 4],
    sampling={"temperature": 0.5},
)


def put(folder: Path, run: Evaluation = RUN, dataset: str = "sums", split: str = "test") -> str:
    path = add_evaluation(folder, run, dataset=dataset, split=split, verifier="mine.grade")
    assert path == folder / "README.md"
    return path.read_text()


def test_an_evaluation_has_its_intervals_in_the_text_and_its_values_in_the_head(tmp_path):
    text = put(tmp_path)
    summary = RUN.summary()
    first = summary["pass@1"]
    assert first.estimate == (4 + 0.5 * 2) / 8 == 0.625
    assert first.lower < 0.625 < first.upper
    ends = f"{100 * first.lower:.1f} to {100 * first.upper:.1f}"
    assert f"| pass@1, sampled (%) | 62.5 | {ends} |" in text
    assert "8 prompts with 4 sampled answers each, graded by `mine.grade`." in text
    assert "95 % percentile bootstrap over 8 prompts" in text
    results = {r.metric_type: r for r in ModelCard(text).data.eval_results}
    assert {name: r.metric_value for name, r in results.items()} == {
        "pass@1": 0.625,
        "accuracy": 0.625,
        "pass@4": 0.75,
    }
    one = results["pass@1"]
    assert (one.task_type, one.dataset_type, one.dataset_split) == (
        "text-generation",
        "sums",
        "test",
    )
    assert one.metric_config == "temperature 0.5"
    assert results["accuracy"].metric_config == "greedy decoding"


def test_the_same_evaluation_is_replaced_and_another_one_added(tmp_path):
    put(tmp_path)
    better = replace(RUN, correct=[4] * 8)
    text = put(tmp_path, better)
    assert text.count("### sums, test, temperature 0.5") == 1
    assert "| pass@1, sampled (%) | 100.0 | 100.0 to 100.0 |" in text
    assert {r.metric_value for r in ModelCard(text).data.eval_results} == {1.0, 0.625}
    put(tmp_path, replace(RUN, sampling={"temperature": 1.0}))
    text = put(tmp_path, dataset="products")
    assert text.count("## Evaluation\n") == 1
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        "### sums, test, temperature 0.5",
        "### sums, test, temperature 1",
        "### products, test, temperature 0.5",
    ]
    again = put(tmp_path, dataset="products")
    assert again == text


def test_what_the_trainer_wrote_stays_and_the_evaluation_comes_before_the_settings(tmp_path):
    trainer = dft_trainer(tmp_path / "calc", gamma=0.7)
    trainer.save_model()
    before = (tmp_path / "calc" / "README.md").read_text()
    text = put(tmp_path / "calc")
    places = [text.index(f"\n## {name}\n") for name in ("Data", "Evaluation", "Settings")]
    assert places == sorted(places)
    assert text.split("## Settings")[1] == before.split("## Settings")[1]
    assert ModelCard(text).data.tags == ["llm-xrisk", "discriminative-fine-tuning"]
    assert text.endswith("\n") and "\n\n\n" not in text


def test_a_card_written_by_hand_keeps_every_word(tmp_path):
    head = "---\nlicense: mit\npipeline_tag: text-generation\n---\n"
    (tmp_path / "README.md").write_text(f"{head}\n# mine\n\nText.\n\n## Use\n\nSo.\n")
    text = put(tmp_path)
    card = ModelCard(text)
    assert card.data.license == "mit" and card.data.pipeline_tag == "text-generation"
    assert card.text.startswith("\n# mine\n\nText.\n\n## Use\n\nSo.\n\n## Evaluation\n\n### sums")


def test_paths_are_cut_and_a_card_without_a_head_gets_one(tmp_path):
    (tmp_path / "README.md").write_text("# mine\n")
    data = tmp_path / "held_out.jsonl"
    data.write_text("{}\n")
    text = put(tmp_path, dataset=str(data))
    assert "### held_out.jsonl, test" in text and str(tmp_path) not in text
    assert ModelCard(text).data.eval_results[0].dataset_type == "held_out.jsonl"


def test_a_broken_head_and_a_missing_folder_are_named(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [a\n---\n# mine\n")
    with pytest.raises(ValueError, match=r"README.md has a head that is no model card's"):
        put(tmp_path)
    with pytest.raises(FileNotFoundError, match="which is no folder; need that of a saved model"):
        add_evaluation(tmp_path / "nowhere", RUN, dataset="sums")


def test_evaluations_during_training_are_in_the_card(tmp_path):
    trainer = dft_trainer(
        tmp_path,
        eval_dataset={"near": pairs(8), "far": pairs(4)},
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
    )
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    logged = [line for line in trainer.state.log_history if "eval_near_auc" in line][-1]
    assert logged["step"] == 4
    assert f"| near_auc | {logged['eval_near_auc']:.4g} |" in text
    assert "| far_loss |" in text and "runtime" not in text
    assert text.count("### In training, step 4") == 1
    assert put(tmp_path).count("### ") == 2


def test_a_trainer_that_never_evaluated_has_no_such_section(tmp_path):
    trainer = disco_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "## Evaluation" not in text
    assert "| reward_funcs | even_code |" in text
    assert f"## Data\n\n{len(questions())} rows with answer, index, prompt.\n" in text


def test_the_data_are_named_as_they_were_asked_for(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    shipped = described(load_rows("gsm8k_steps", limit=3))
    assert shipped == "gsm8k_steps: 3 rows with answer, completion, id, index, prompt"
    assert described(load_rows(str(file))) == "rows.jsonl: 1 rows with completion, index, prompt"
    assert described(None) == described([]) == ""


def test_the_evaluate_command_fills_in_the_card_of_a_model_in_a_folder(tmp_path, tiny_model_path):
    def run(*arguments: str) -> None:
        short = ("--limit", "4", "--num_generations", "2", "--ks", "1", "--max_new_tokens", "4")
        parser = RecipeParser((ScriptArguments, SamplingConfig))
        main(*parser.parse_args_and_config([*short, "--update_card", "true", *arguments]))

    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    run("--model_name_or_path", str(folder))
    text = (folder / "README.md").read_text()
    assert "### gsm8k_steps, test, temperature 1" in text
    assert "graded by `reward.arithmetic_reward`" in text
    for model in ((), ("--model_name_or_path", "some/model")):
        with pytest.raises(ValueError, match=r"got update_card with .* need a model in a"):
            run(*model)
