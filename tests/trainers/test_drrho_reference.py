"""DRRHO's reference: its losses, the file that keeps them, and what is refused."""

import gc
import weakref
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import SFTConfig

from llm_xrisk.data import with_index
from llm_xrisk.data.drrho_dataset import prepare_drrho_dataset
from llm_xrisk.trainers import DFTConfig
from llm_xrisk.trainers.drrho import DRRHOTrainer
from llm_xrisk.trainers.drrho_config import DRRHOConfig
from tests.trainers.build import COMMON, losses, pairs, tiny_model, tokenizer, weights
from tests.trainers.test_drrho import LEVELS, reference, rows_of, token_losses, trainer_of

__all__ = ["reference"]  # a fixture
FILE = "reference_losses.safetensors"
Row = dict[str, Any]


def started(output: Any, **changes: Any) -> DRRHOTrainer:
    """A trainer that has taken a step."""
    run = trainer_of(output, **({"max_steps": 1} | changes))
    run.train()
    return run


def without(rows: list[Row], name: str) -> list[Row]:
    return [{key: value for key, value in row.items() if key != name} for row in rows]


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("level", LEVELS)
def test_reference_losses_are_those_of_rows_without_padding(tmp_path, reference, level, side):
    run = started(tmp_path, level=level, padding_side=side, reference_model=reference)
    rows = rows_of(run)
    assert len({len(row["completion_ids"]) for row in rows}) > 1
    for row, known in zip(rows, token_losses(tiny_model(seed=3), rows), strict=True):
        expected = known if level == "token" else known.sum().reshape(1)
        found = run.data_collator.reference[row["index"]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("level", LEVELS)
def test_both_models_are_scored_on_the_same_tokens(tmp_path, monkeypatch, reference, level, side):
    """The response's, the same for both, each after the same context."""
    seen: dict[bool, set[tuple[Any, ...]]] = {True: set(), False: set()}
    score = DRRHOTrainer.token_log_probs

    def watch(self: Any, model: Any, batch: Any, **options: Any) -> Any:
        columns = (batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"])
        for ids, there, mask in zip(*columns, strict=True):
            seen[model is self.model].add((tuple(ids[there].tolist()), tuple(ids[mask].tolist())))
        return score(self, model, batch, **options)

    monkeypatch.setattr(DRRHOTrainer, "token_log_probs", watch)
    settings = {"level": level, "padding_side": side, "reference_model": reference}
    run = started(tmp_path, max_steps=3, **settings)
    rows = [(r["prompt_ids"] + r["completion_ids"], r["completion_ids"]) for r in rows_of(run)]
    assert seen[True] == seen[False] == {(tuple(whole), tuple(end)) for whole, end in rows}


@pytest.mark.parametrize("given", ["by name", "initial"])
def test_no_reference_model_is_in_memory_while_training(tmp_path, monkeypatch, reference, given):
    tiny_model().save_pretrained(tmp_path / "base")
    loaded: list[Any] = []
    load = PreTrainedModel.from_pretrained.__func__

    def loading(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append(weakref.ref(model := load(cls, *args, **kwargs)))
        return model

    alive: list[int] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            alive.append(sum(model() is not None for model in loaded))

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(loading))
    name = {"reference_model": reference} if given == "by name" else {}
    model = str(tmp_path / "base")
    run = started(tmp_path, model=model, max_steps=3, callbacks=[Look()], **name)
    gc.collect()
    assert len(loaded) == (2 if name else 1)
    assert alive == [1, 1, 1]
    assert loaded[0]() is run.model


def test_the_reference_s_settings_reach_it(tmp_path, reference):
    kwargs = '{"dtype": "bfloat16"}'
    half = started(tmp_path / "a", reference_model=reference, reference_init_kwargs=kwargs)
    full = started(tmp_path / "b", reference_model=reference)
    one, other = (run.data_collator.reference.losses for run in (half, full))
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.1)


# -- the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["by name", "initial"])
def test_another_run_finds_its_examples_in_the_file(tmp_path, monkeypatch, reference, kind):
    """Fewer of them, in another order, for another objective: by id and tokens."""
    name = {"reference_model": reference} if kind == "by name" else {}
    settings = {"reference_cache": str(tmp_path / "shared" / "losses.safetensors")} | name
    first = started(tmp_path / "a", **settings)
    monkeypatch.setattr(DRRHOTrainer, "_reference_pass", None)
    rows = list(reversed(pairs()[5:20]))
    other = started(tmp_path / "b", objective="CVaRDRO", rows=rows, **settings)
    for row in rows:
        one, two = (run.data_collator.reference[row["index"]] for run in (first, other))
        assert torch.equal(one, two)
    assert not (tmp_path / "b" / FILE).exists()


STALE: dict[str, tuple[dict[str, Any], str]] = {
    "tokens": ({"rows": [r | {"completion": r["completion"] + "0"} for r in pairs()]}, "example 0"),
    "length": ({"max_length": 9}, "other tokens: another data set, tokenizer, template or max_len"),
    "examples": ({"rows": pairs(30)}, r"lacks example 24 \(6 of 30 examples are not there"),
    "level": ({"level": "token"}, "it holds sequence losses, level is 'token'"),
    "weights": ({"model": tiny_model(seed=1)}, "it holds losses of the initial model"),
}


@pytest.mark.parametrize("name", STALE)
def test_a_stale_file_is_refused_by_name(tmp_path, name):
    rows = [row for row in pairs() if len(row["completion"]) > 0]
    started(tmp_path, rows=rows)
    changes, why = STALE[name]
    if name == "length":
        longest = max(len(r["prompt_ids"]) for r in rows_of(trainer_of(tmp_path)))
        changes = {"max_length": longest + 1}
    with pytest.raises(ValueError, match=why) as caught:
        started(tmp_path, **changes)
    text = str(caught.value)
    assert f"the reference cache {tmp_path / FILE} is stale" in text
    assert "delete the file, or name another one by reference_cache" in text


def test_a_file_of_another_reference_is_refused_by_name(tmp_path, reference):
    started(tmp_path)
    with pytest.raises(ValueError, match=f"losses of the initial model .* is {reference}"):
        started(tmp_path, reference_model=reference)
    save_file({"x": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="is stale: it is no file of reference losses"):
        started(tmp_path)


def test_weights_that_changed_under_the_same_name_are_noticed(tmp_path):
    tiny_model(seed=3).save_pretrained(tmp_path / "reference")
    name = {"reference_model": str(tmp_path / "reference")}
    started(tmp_path, **name)
    started(tmp_path, **name)
    tiny_model(seed=4).save_pretrained(tmp_path / "reference")
    with pytest.raises(ValueError, match=r"is stale: it holds losses of .*reference"):
        started(tmp_path, **name)


def test_a_resumed_run_with_other_rows_is_refused(tmp_path):
    started(tmp_path, save_strategy="steps", save_steps=1)
    rows = [row | {"completion": "1"} for row in pairs()]
    run = trainer_of(tmp_path, rows=rows, max_steps=2)
    with pytest.raises(ValueError, match=r"24 have other tokens.* settings the run started with"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# -- bad references --------------------------------------------------------------------------------


def test_a_reference_that_reads_other_tokens_is_refused(tmp_path):
    tiny_model(seed=3).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    started(tmp_path / "same", reference_model=str(tmp_path))
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"+"', '"§"'))
    assert "§" in AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    with pytest.raises(ValueError, match=r"another vocabulary than .* \(1 of 102 tokens differ"):
        started(tmp_path / "other", reference_model=str(tmp_path))


def test_a_reference_of_fewer_tokens_is_refused(tmp_path):
    tiny_model(vocab_size=20).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got token id \d+ for a reference model of 20 tokens"):
        started(tmp_path / "run", reference_model=str(tmp_path))


def test_a_reference_without_numbers_is_refused_with_the_example(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    rows = [row | {"index": row["index"] + 7} for row in pairs()]
    with pytest.raises(ValueError, match="example with index 7 a loss that is no finite number"):
        started(tmp_path / "run", rows=rows, reference_model=str(tmp_path))


# -- bad settings ----------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": "DFT"}, "objective must be one of .*KLDRO.*got 'DFT'"),
    "level": ({"level": "word"}, "level must be one of .*'sequence', 'token'.*got 'word'"),
    "reduction": ({"loss_reduction": "max"}, "loss_reduction must be one of"),
    "selection": ({"selection": "top"}, "selection must be one of .*rho_topk"),
    "token sum": ({"level": "token", "loss_reduction": "sum"}, "drop loss_reduction"),
    "keep": ({"keep_fraction": 0.0}, r"keep_fraction must be in \(0, 1\], got 0.0"),
    "k and alpha": ({"k": 3, "alpha": 0.1}, "give one of the two"),
    "unasked": ({"reference_model": "x", "use_reference": False}, "drop one of them"),
    "loss_type": ({"loss_type": "nll"}, "got loss_type='nll'"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_bad_setting_is_refused_by_name(tmp_path, name):
    changes, why = SETTINGS[name]
    with pytest.raises(ValueError, match=why):
        DRRHOConfig(output_dir=str(tmp_path), **(COMMON | changes))


def test_settings_that_the_objective_does_not_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"KLDRO has no \['alpha', 'rho'\]; it takes"):
        trainer_of(tmp_path, "KLDRO", rho=0.1, alpha=0.1)
    with pytest.raises(ValueError, match=r"selection=rho_topk has no \['gamma', 'tau'\]"):
        trainer_of(tmp_path, "KLDRO", selection="rho_topk")
    with pytest.raises(ValueError, match="gamma"):
        trainer_of(tmp_path, "KLDRO", gamma=1.5)


@pytest.mark.parametrize("kind", [DFTConfig, SFTConfig])
def test_settings_of_another_trainer_are_refused(tmp_path, kind):
    args = kind(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="needs a DRRHOConfig"):
        DRRHOTrainer(tiny_model(), args, train_dataset=pairs(), processing_class=tokenizer())


# -- data ------------------------------------------------------------------------------------------


def prepared(rows: Any, max_length: int = 64) -> list[Row]:
    made = prepare_drrho_dataset(rows, tokenizer=tokenizer(), max_length=max_length)
    names = ("index", "prompt_ids", "completion_ids")
    return [{name: made[k][name] for name in names} for k in range(len(made))]


def messages(row: Row) -> tuple[list[Row], list[Row]]:
    return (
        [{"role": "user", "content": row["prompt"]}],
        [{"role": "assistant", "content": row["completion"]}],
    )


def test_the_formats_of_supervised_fine_tuning_are_read_alike():
    plain, told = pairs(6), [messages(row) for row in pairs(6)]
    asked = [{"index": k, "prompt": p, "completion": c} for k, (p, c) in enumerate(told)]
    whole = [{"index": k, "messages": p + c} for k, (p, c) in enumerate(told)]
    assert prepared(asked) == prepared(whole)
    assert prepared(asked)[0]["prompt_ids"][0] == tokenizer().convert_tokens_to_ids("<|user|>")
    assert all(row["completion_ids"][-1] == tokenizer().eos_token_id for row in prepared(plain))
    for rows in (plain, asked, whole):
        table = with_index(Dataset.from_list(without(rows, "index")))
        assert prepared(table) == prepared(rows)
        assert prepared(prepared(rows)) == prepared(rows)
    cut = prepared(plain, max(len(row["prompt_ids"]) for row in prepared(plain)) + 1)
    assert any(row["completion_ids"][-1] != tokenizer().eos_token_id for row in cut)


BAD: dict[str, tuple[type[Exception], list[Row], str]] = {
    "no index": (ValueError, without(pairs(4), "index"), "no `index`.*with_index"),
    "text": (ValueError, [{"index": 0, "text": "1+1=2"}], "no response.*`text` alone does not say"),
    "no answer": (ValueError, without(pairs(4), "completion"), "no response to take the loss of"),
    "empty": (ValueError, [r | {"completion": ""} for r in pairs(2)], "empty completion"),
    "no ids": (ValueError, [{"index": 3, "prompt_ids": [5], "completion_ids": []}], "index 3 has"),
    "long": (ValueError, [r | {"prompt": "1" * 99} for r in pairs(2)], "max_length is 64; raise"),
    "long ids": (ValueError, [{"index": 3, "prompt_ids": [5] * 64, "completion_ids": [6]}], "3 h"),
    "twice": (IndexError, [r | {"index": 2} for r in pairs(3)], "got index 2 in 3 rows"),
    "negative": (IndexError, [r | {"index": r["index"] - 1} for r in pairs(3)], "got index -1"),
    "user last": (
        ValueError,
        [{"index": 5, "messages": [{"role": "user", "content": "1"}]}],
        r"index 5 has messages by \['user'\]; they must end in the assistant's",
    ),
    "none": (ValueError, [], "has no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_by_name(name):
    error, rows, why = BAD[name]
    with pytest.raises(error, match=why):
        prepared(rows)


def test_a_stream_is_refused():
    stream = Dataset.from_list(pairs(4)).to_iterable_dataset()
    with pytest.raises(TypeError, match="got a IterableDataset, which has no length"):
        prepared(stream)


def test_the_saved_model_loads_without_the_package_and_its_card_names_the_method(tmp_path):
    run = started(tmp_path, objective="KLConstrainedDRO")
    run.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(weights(model), weights(run.model))
    card = (tmp_path / "README.md").read_text()
    assert "DRRHO risk minimisation, objective KLConstrainedDRO" in card
    assert "2505.06699" in card
    assert "| rho | 0.3 |" in card
    assert len(losses(run)) == 1
