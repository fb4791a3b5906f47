"""Reward functions by their dotted names."""

import pickle

import pytest

from reward import arithmetic_reward
from reward.by_name import reward_function


def test_a_dotted_name_is_imported() -> None:
    assert reward_function("reward.arithmetic_reward") is arithmetic_reward


def test_a_file_of_the_working_directory_is_found(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_own_rewards.py").write_text("def grade(completions, **c):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert reward_function("my_own_rewards.grade")(["2"]) == [1.0]


def test_a_name_without_a_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got the reward function 'grade', need module\.function"):
        reward_function("grade")


def test_a_misspelled_function_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'reward\.arithmetc'.* it has .*arithmetic_reward"):
        reward_function("reward.arithmetc")


def test_the_verifiers_of_mathematics_are_found_by_name_and_travel() -> None:
    batch = {"prompts": ["2+2="], "completions": ["The answer is 4."], "answer": ["4"]}
    for name, expected in (("math_reward", [0.0]), ("lenient_math_reward", [1.0])):
        function = reward_function(f"reward.{name}")
        assert pickle.loads(pickle.dumps(function))(**batch) == expected
        assert function.__name__ == name
