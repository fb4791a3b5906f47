"""``llm-xrisk serve``: what it takes a folder for, what it starts, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_xrisk import cli
from llm_xrisk.serving.vllm_server import Served, find_served, serve, server_command
from tests.conftest import ROOT
from tests.serving.vllm_servers import tempnet

V = 12


def model(folder: Path, **generation: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": V}))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def with_tempnet(folder: Path, vocab_size: int = V, **options: Any) -> Path:
    tempnet(vocab_size, **options).save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path | str, **config: Any) -> Path:
    folder.mkdir()
    settings = {"base_model_name_or_path": str(base), "r": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def options(command: list[str]) -> dict[str, str]:
    """Of a command line in which every option has one value, those without left out."""
    words = command[command.index("--model") :]
    return {
        word: value
        for word, value in zip(words, [*words[1:], "--"], strict=True)
        if word.startswith("--") and not value.startswith("--")
    }


def test_a_plain_model_is_vllms_server_on_the_loopback_address(tmp_path):
    folder = model(tmp_path / "m")
    command = server_command(find_served(str(folder)), ["--port", "81", "--dtype", "auto"])
    assert command[0] == sys.executable
    assert options(command) == {
        "--model": str(folder),
        "--host": "127.0.0.1",
        "--port": "81",
        "--dtype": "auto",
    }


@pytest.mark.parametrize("given", [["--host", "0.0.0.0"], ["--host=::"], ["--uds", "socket"]])
def test_an_address_of_the_users_stays(given):
    assert server_command(Served("m", "m"), given)[-len(given) :] == given
    assert "127.0.0.1" not in server_command(Served("m", "m"), given)


def test_options_in_the_file_of_config_count_as_given(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("host: 0.0.0.0\nserved_model_name: x\n")
    found = server_command(Served("net", "base"), ["--config", str(file)])
    assert "--host" not in found and "--served-model-name" not in found
    with pytest.raises(FileNotFoundError, match=r"got --config nope\.yaml, which is no file"):
        server_command(Served("m", "m"), ["--config", "nope.yaml"])


def test_the_tempnet_in_a_models_folder_is_left_to_the_plugin(tmp_path):
    folder = with_tempnet(model(tmp_path / "m"))
    found = find_served(str(folder))
    assert found == Served(str(folder), str(folder), tempnet=str(folder))
    assert "--additional-config" not in server_command(found)


def test_another_tempnet_or_none_goes_to_the_plugin_beside_other_settings(tmp_path):
    folder, other = with_tempnet(model(tmp_path / "m")), with_tempnet(tmp_path / "other")
    mine = ["--additional-config", '{"gdn_prefill_backend": "auto"}', "--port", "81"]
    for wish, value in ((str(other), str(other)), ("None", False)):
        found = options(server_command(find_served(str(folder), wish), mine))
        assert json.loads(found["--additional-config"]) == {
            "gdn_prefill_backend": "auto",
            "tempnet": value,
        }
        assert found["--port"] == "81"
    with pytest.raises(ValueError, match=r"got --additional-config \{; need a JSON object"):
        server_command(find_served(str(folder), "none"), ["--additional-config", "{"])


def test_a_tempnet_alone_is_served_with_the_model_it_names(tmp_path):
    base = model(tmp_path / "base")
    folder = with_tempnet(tmp_path / "net", base_model=str(base))
    found = find_served(str(folder))
    assert found == Served(str(folder), str(base), tempnet=str(folder))
    command = options(server_command(found))
    assert command["--served-model-name"] == str(folder)
    assert json.loads(command["--additional-config"]) == {"tempnet": str(folder)}


def test_an_adapter_is_served_on_its_base_without_the_temperatures_of_the_base(tmp_path):
    base = with_tempnet(model(tmp_path / "base"))
    folder = adapter(tmp_path / "lora", base, rank_pattern={"q_proj": 9})
    found = find_served(str(folder))
    assert found == Served(str(folder), str(base), str(folder), 9)
    command = server_command(found)
    assert "--enable-lora" in command
    assert options(command)["--max-lora-rank"] == "16"
    assert json.loads(options(command)["--lora-modules"])["name"] == str(folder)
    assert json.loads(options(command)["--additional-config"]) == {"tempnet": False}
    assert "--max-lora-rank" in server_command(found, ["--max-lora-rank", "64"])
    assert "16" not in server_command(found, ["--max-lora-rank", "64"])


@pytest.mark.parametrize(("rank", "largest"), [(1, 8), (8, 8), (12, 16), (64, 64), (512, 512)])
def test_the_rank_is_one_that_vllm_takes(rank, largest):
    command = server_command(Served("a", "m", "a", rank))
    assert options(command)["--max-lora-rank"] == str(largest)


def test_a_larger_rank_is_to_be_merged():
    with pytest.raises(ValueError, match="has rank 513, vLLM takes 512 at most; merge it"):
        server_command(Served("a", "m", "a", 513))


def test_a_tempnet_trained_on_an_adapter_brings_both(tmp_path):
    lora = adapter(tmp_path / "lora", model(tmp_path / "base"))
    folder = with_tempnet(tmp_path / "net", base_model=str(lora))
    assert find_served(str(folder)) == Served(
        str(folder), str(tmp_path / "base"), str(lora), 4, str(folder)
    )


def test_requests_are_at_temperature_1_whatever_the_model_says(tmp_path):
    folder = with_tempnet(model(tmp_path / "m", temperature=0.7, top_p=0.8))
    found = find_served(str(folder))
    overriding = options(server_command(found))["--override-generation-config"]
    assert json.loads(overriding) == {"temperature": 1.0}
    assert "--override-generation-config" not in server_command(
        found, ["--generation-config", "vllm"]
    )
    plain = find_served(str(folder), "none")
    assert "--override-generation-config" not in server_command(plain)


def test_drafts_and_a_tempnet_are_refused_and_drafts_alone_are_not():
    for given in (["--spec-method", "ngram"], ["-sc", "{}"], ["--speculative_config={}"]):
        with pytest.raises(ValueError, match="and the TempNet of t: drafts would be accepted"):
            server_command(Served("m", "m", tempnet="t"), given)
        server_command(Served("m", "m"), given)


def refusal(capsys, *arguments: Path | str) -> str:
    assert serve([str(a) for a in arguments]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_served_is_told_in_a_line(tmp_path, capsys):
    assert "got --port first; need MODEL before" in refusal(capsys, "--port", "8000", "m")
    assert "nope, which is no folder" in refusal(capsys, tmp_path / "nope")
    assert "has neither config.json nor adapter_config.json nor" in refusal(capsys, tmp_path)
    folder = with_tempnet(model(tmp_path / "m"), vocab_size=13)
    assert "reads a vocabulary of 13, the model has 12" in refusal(capsys, folder)
    plain = model(tmp_path / "plain")
    assert "has no tempnet_config.json" in refusal(capsys, plain, "--tempnet", plain)
    nameless = with_tempnet(tmp_path / "net")
    assert f"llm-xrisk serve MODEL --tempnet {nameless}" in refusal(capsys, nameless)
    lost = adapter(tmp_path / "lora", tmp_path / "gone")
    assert "gone, which is not here; serve the model from" in refusal(capsys, lost)


def test_the_help_names_our_option_and_the_way_to_vllms(capsys):
    assert cli.main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: llm-xrisk serve MODEL [--tempnet FOLDER|none]")
    assert "-m vllm.entrypoints.openai.api_server --help" in text
    assert cli.main(["serve"]) == 2


def test_a_missing_vllm_is_told_with_the_line_that_installs_it(tmp_path):
    """In a process that cannot see it, as where it is not installed."""
    hidden = tmp_path / "sitecustomize.py"
    hidden.write_text("import sys\nsys.modules['vllm'] = None\n")
    found = subprocess.run(
        [sys.executable, "-m", "llm_xrisk.cli", "serve", "some/model"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert 'vLLM is not installed; need it to serve: pip install "llm-xrisk[' in found.stderr


def test_looking_for_what_to_serve_imports_neither_vllm_nor_transformers():
    code = (
        "import sys, llm_xrisk.serving; from llm_xrisk.serving.vllm_server import find_served; "
        "find_served('m'); print(*({'vllm', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == ""
