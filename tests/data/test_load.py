"""Data sets by name."""

import pytest
from datasets import load_dataset

from llm_xrisk.data.columns import require_columns
from llm_xrisk.data.load import load_rows


def test_a_file_is_numbered(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "1+1="}\n{"prompt": "1+2="}\n')
    assert load_rows(str(path), limit=1).to_list() == [{"prompt": "1+1=", "index": 0}]


@pytest.mark.parametrize("name", ["nowhere.jsonl", "outputs/no-pool", "no-such-owner/no-such-set"])
def test_what_is_not_there_is_named_with_what_would_do(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as found:
        load_rows(name)
    assert f"got the data set '{name}'" in str(found.value)
    assert "llm-xrisk pool makes one" in str(found.value)
    assert found.value.__cause__ is not None


def test_an_empty_directory_is_no_pool(tmp_path):
    with pytest.raises(FileNotFoundError, match="directory of a finished pool"):
        load_rows(str(tmp_path))


def test_other_errors_of_datasets_stay_as_they_are(tmp_path):
    path = tmp_path / "torn.jsonl"
    path.write_text('{"prompt": ')
    with pytest.raises(Exception) as theirs:
        load_dataset("json", data_files=str(path), split="train")
    with pytest.raises(type(theirs.value)):
        load_rows(str(path))


def test_optional_columns_are_not_required():
    def grade(completions, answer, hint=None, **columns):
        return []

    require_columns(grade, ["prompt", "answer"])
    with pytest.raises(ValueError, match=r"grade asks for \['answer'\] .* columns \['prompt'\]"):
        require_columns(grade, ["prompt"])
