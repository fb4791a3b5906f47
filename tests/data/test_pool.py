"""The pool on disk: what it holds, what it refuses, and what survives a crash."""

import json
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from llm_xrisk.data.fingerprint import Identity, tokenizer_identity
from llm_xrisk.data.gsm8k_steps import tiny_model_path
from llm_xrisk.data.pool import COUNTS, Negative, Pool, PoolRow, PoolSettings, load_pool
from llm_xrisk.data.pool_writer import PartialPool, merge_partials, replace_file, write_pool

ZERO = dict.fromkeys(COUNTS, 0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_model_path())


@pytest.fixture
def settings(tokenizer):
    return PoolSettings(
        tokenizer=tokenizer_identity(tokenizer),
        reference=Identity("tiny-calculator", "aaaa"),
        sampler={"temperature": 1.0, "seed": 0, "system_prompt": "Be wrong."},
        verify=None,
        rows="bbbb",
    )


def make_row(number, texts=("26", "28")):
    negatives = [
        Negative([10 + k, 20, 1], text, truncated=k == 1, ref_log_likelihood=-1.5 - k, generation=k)
        for k, text in enumerate(texts)
    ]
    kept = len(negatives)
    return PoolRow(
        prompt_id=100 + number,
        prompt=f"{number}+1=",
        completion=str(number + 1),
        prompt_ids=[5, number + 2],
        completion_ids=[7, 1],
        negatives=negatives,
        counts=ZERO | {"generated": kept + 1, "equal_to_gold": 1, "kept": kept},
        columns={"answer": str(number + 1)},
    )


@pytest.fixture
def pool(settings):
    return Pool([make_row(0), make_row(1, texts=()), make_row(2, texts=("é",))], settings)


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_pool_comes_back_as_it_was_written(tmp_path, pool, file_format):
    write_pool(tmp_path, pool, file_format=file_format)
    assert load_pool(tmp_path) == pool
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pool.json", f"pool.{file_format}"]


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_conversations_come_back_as_they_were_written(tmp_path, settings, file_format):
    talk = replace(
        make_row(0),
        prompt=[{"role": "system", "content": "s"}, {"role": "user", "content": "0+1="}],
        completion=[{"role": "assistant", "content": "1", "name": "a"}],
        columns={"chat_template_kwargs": {"enable_thinking": False}},
    )
    pool = Pool([talk, make_row(1)], settings)
    write_pool(tmp_path, pool, file_format=file_format)
    assert load_pool(tmp_path) == pool


def test_metadata_says_what_made_the_pool(tmp_path, pool, tokenizer):
    write_pool(tmp_path, pool)
    metadata = json.loads((tmp_path / "pool.json").read_text())
    assert metadata["settings"]["sampler"]["system_prompt"] == "Be wrong."
    assert metadata["settings"]["tokenizer"]["name"] == tokenizer.name_or_path
    assert metadata["settings"]["reference"] == {"name": "tiny-calculator", "fingerprint": "aaaa"}
    assert metadata["counts"] == ZERO | {
        "generated": 3 + 1 + 2,
        "equal_to_gold": 3,
        "kept": 2 + 0 + 1,
        "truncated": 1,
        "prompts": 3,
        "prompts_without_negatives": 1,
    }


def test_dataset_is_what_the_trainer_consumes(pool):
    dataset = pool.to_dataset()
    assert dataset["index"] == [0, 1]
    assert dataset["prompt_id"] == [100, 102]
    assert dataset[0] == {
        "index": 0,
        "prompt_id": 100,
        "prompt": "0+1=",
        "completion": "1",
        "prompt_ids": [5, 2],
        "completion_ids": [7, 1],
        "negative_ids": [[10, 20, 1], [11, 20, 1]],
        "ref_log_likelihoods": [-1.5, -2.5],
        "negative_truncated": [False, True],
        "answer": "1",
    }


def test_prompts_without_negatives_stay_on_request(pool):
    dataset = pool.to_dataset(with_empty=True)
    assert dataset["index"] == [0, 1, 2]
    assert dataset[1]["negative_ids"] == []


def test_pool_of_another_tokenizer_is_refused_by_name(tmp_path, pool):
    write_pool(tmp_path, pool)
    other = AutoTokenizer.from_pretrained(tiny_model_path())
    load_pool(tmp_path, tokenizer=other)
    other.add_tokens(["<new>"])
    other.name_or_path = "other-tokenizer"
    message = (
        r"got tokenizer 'other-tokenizer'.*made with tokenizer '.*tiny-calculator'.*train with"
    )
    with pytest.raises(ValueError, match=message):
        load_pool(tmp_path, tokenizer=other)


def test_pool_of_another_reference_model_is_refused_by_name(tmp_path, pool):
    write_pool(tmp_path, pool)
    load_pool(tmp_path, reference_model_fingerprint="aaaa")
    message = r"got reference model .*cccc.*made with reference model 'tiny-calculator' \(aaaa\)"
    with pytest.raises(ValueError, match=message):
        load_pool(tmp_path, reference_model_fingerprint="cccc")


def test_pool_without_usable_negative_is_neither_written_nor_read(tmp_path, pool, settings):
    message = r"no usable negative \(generated 1, equal_to_gold 1.*draw more.*temperature"
    with pytest.raises(ValueError, match=message):
        write_pool(tmp_path, Pool([make_row(1, texts=())], settings))
    assert not (tmp_path / "pool.json").exists()
    write_pool(tmp_path, pool)
    metadata = json.loads((tmp_path / "pool.json").read_text())
    (tmp_path / "pool.jsonl").write_text("")
    metadata["sha256"] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "pool.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"no usable negative"):
        load_pool(tmp_path)


def test_changed_file_is_refused(tmp_path, pool):
    write_pool(tmp_path, pool)
    with (tmp_path / "pool.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"pool\.jsonl is not the file that pool\.json describes"):
        load_pool(tmp_path)


def test_newer_format_is_refused(tmp_path, pool):
    write_pool(tmp_path, pool)
    text = (tmp_path / "pool.json").read_text()
    (tmp_path / "pool.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match=r"format version 2, this package reads 1; build .* anew"):
        load_pool(tmp_path)


def test_missing_pool_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no finished pool in .*pool\.json is missing"):
        load_pool(tmp_path)


def test_unknown_file_format_is_refused(tmp_path, pool):
    with pytest.raises(ValueError, match=r"got file_format='csv'; choose 'jsonl' or 'parquet'"):
        write_pool(tmp_path, pool, file_format="csv")


def test_failed_write_leaves_the_old_file_whole(tmp_path):
    file = tmp_path / "pool.json"
    replace_file(file, b"old")
    with pytest.raises(TypeError):
        replace_file(file, "not bytes")
    assert file.read_bytes() == b"old"


@pytest.mark.parametrize("torn", [b"", b'{"prompt_id": 5, "pro', b'{"a": 1}'])
def test_partial_pool_goes_on_behind_a_torn_last_line(tmp_path, settings, torn):
    rows = [make_row(number) for number in range(3)]
    PartialPool(tmp_path, settings).append(rows[:2])
    file = tmp_path / "pool.partial.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + torn)
    resumed = PartialPool(tmp_path, settings)
    assert resumed.rows == rows[:2]
    assert file.read_bytes() == whole
    resumed.append(rows[2:])
    assert PartialPool(tmp_path, settings).rows == rows


def test_partial_pool_torn_in_its_first_line_starts_anew(tmp_path, settings):
    (tmp_path / "pool.partial.jsonl").write_text('{"format_ver')
    partial = PartialPool(tmp_path, settings)
    partial.append([make_row(0)])
    assert PartialPool(tmp_path, settings).rows == [make_row(0)]


def test_partial_pool_damaged_in_the_middle_is_refused(tmp_path, settings):
    PartialPool(tmp_path, settings).append([make_row(0), make_row(1)])
    file = tmp_path / "pool.partial.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + "?\n" + lines[2])
    with pytest.raises(ValueError, match=r"line 2 of .*only a last line may be torn; delete"):
        PartialPool(tmp_path, settings)


def test_partial_pool_drops_an_unfinished_batch(tmp_path, settings):
    partial = PartialPool(tmp_path, settings)
    partial.append([make_row(number) for number in range(5)])
    partial.keep(4)
    partial.append([make_row(9)])
    found = [row.prompt_id for row in PartialPool(tmp_path, settings).rows]
    assert found == [100, 101, 102, 103, 109]


def test_partial_pool_of_other_settings_is_refused_by_name(tmp_path, settings):
    PartialPool(tmp_path, settings)
    warmer = replace(settings, sampler={**settings.sampler, "temperature": 0.7}, verify="f")
    message = r"temperature is 1\.0, not 0\.7; verify is None, not 'f'\. Run with those, or"
    with pytest.raises(ValueError, match=message):
        PartialPool(tmp_path, warmer)
    other = replace(settings, reference=Identity("bigger", "dddd"))
    with pytest.raises(
        ValueError, match=r"reference model is 'tiny-calculator' \(aaaa\), not 'big"
    ):
        PartialPool(tmp_path, other)


def test_partial_pools_of_several_processes_merge_in_order(tmp_path, settings):
    for rank in range(2):
        partial = PartialPool(tmp_path, settings, rank=rank, world_size=2)
        partial.append([make_row(number) for number in range(5)[rank::2]])
    merged = merge_partials(tmp_path, settings, world_size=2)
    assert [row.prompt_id for row in merged] == [100, 101, 102, 103, 104]


def test_partial_pool_of_another_number_of_processes_is_refused(tmp_path, settings):
    PartialPool(tmp_path, settings, rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"pool\.partial-0-of-2\.jsonl, begun by another number"):
        PartialPool(tmp_path, settings)


def test_finished_pool_leaves_no_partial_file(tmp_path, pool):
    PartialPool(tmp_path, pool.settings).append(pool.rows)
    write_pool(tmp_path, pool)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pool.json", "pool.jsonl"]
