"""Reading completions, rows and outputs, and the literals that cross between processes."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reward.code_task import extract_code, read_task, same_output
from reward.solution_runner import literal, parse


def test_outputs_differ_by_a_tolerance_only_if_asked() -> None:
    assert same_output("1 2\n3", " 1\t2 3 \n")
    assert not same_output("1 2", "12")
    assert not same_output("0.30", "0.3")
    assert same_output("0.30", "0.3", tolerance=1e-9)
    assert same_output("1e6", "1000000.5", tolerance=1e-6)
    assert not same_output("1", "nan", tolerance=1.0)
    assert not same_output("inf", "1e400", tolerance=1.0)
    assert not same_output("a", "b", tolerance=1.0)
    assert not same_output("1", "1 1", tolerance=1.0)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```\n```python\nb\n```", "b\n"),
        ("```python\na\n```\n```\nb\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```Python3\na\n```", "a\n"),
        ("```py title=x\na\n```", "a\n"),
        ("````python\n```\na\n```\n````", "```\na\n```\n"),
        ("```bash\nls\n```", None),
        ("```python\na", None),
        ("a = 1", None),
        ("", None),
        ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b\n"),
        ("<think>\n```python\na\n```\n</think>\nnothing", None),
        ("<think>\n```python\na\n```", None),
        ("```python\na\n```\n</think> more </think>\n```python\nb\n```", "b\n"),
        ("```python\r\na\r\n```\r\n", "a\r\n"),
        ("  ```python\n  a\n  ```", "  a\n"),
    ],
)
def test_the_last_closed_block_after_the_reasoning_counts(text: str, program: str | None) -> None:
    assert extract_code(text) == program


def test_extraction_is_linear() -> None:
    for text in ("```python\n" * 100_000, "`" * 1_000_000, "<think>" * 100_000, "\n" * 1_000_000):
        start = time.perf_counter()
        extract_code(text)
        assert time.perf_counter() - start < 2.0


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet="`python\n <think>/"))
def test_no_text_stops_the_extraction(text: str) -> None:
    assert extract_code(text) is None or isinstance(extract_code(text), str)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_literals_read_back_as_they_were(value: object) -> None:
    assert repr(parse(literal(value))) == repr(value)


def test_a_task_is_read_without_running_anything() -> None:
    task = read_task(
        {"test": "assert f() == 1", "entry_point": "f", "prompt": "import os\ndef f():"}
    )
    assert (task.prelude, task.names) == ("", ("f",))
    task = read_task({"test": "assert f()", "entry_point": "f", "prompt": "Write f, please."})
    assert task.prelude == ""
    chat = "Complete this:\n```python\nimport math\nX = 1\ndef f():\n    '''One.'''\n```"
    task = read_task({"test": "assert f()", "entry_point": "f", "prompt": chat})
    assert task.prelude == "import math\nX = 1"


def test_rows_may_be_read_in_many_threads_at_once() -> None:
    golds = [
        {"test": "\n".join([f"assert f({n}) == [[[{n}]]]"] * 200), "entry_point": "f"}
        for n in range(200)
    ]
    with ThreadPoolExecutor(8) as executor:
        tasks = list(executor.map(read_task, golds))
    assert [task.tests for task in tasks] == [gold["test"] for gold in golds]
