"""The command line: what it says, how it splits arguments, and that it really launches."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import TrainingArguments

from llm_xrisk import cli
from llm_xrisk.cli_help import RecipeParser
from llm_xrisk.trainers import DFTConfig

ROOT = Path(__file__).resolve().parent.parent
RECIPE = '''
import json, os
from dataclasses import dataclass
from llm_xrisk.cli_help import RecipeParser

@dataclass
class Settings:
    """Where the answer goes."""
    answer: str
    gamma: float = 0.5
    use_cpu: bool = False

if __name__ == "__main__":
    (settings,) = RecipeParser(Settings).parse_args_and_config()
    seen = {**vars(settings), "world_size": os.environ.get("WORLD_SIZE")}
    with open(settings.answer + os.environ.get("RANK", "0"), "w") as file:
        json.dump(seen, file)
'''


@dataclass
class Method(TrainingArguments):
    """How answers are weighed."""

    gamma: float = field(default=0.5, metadata={"help": "weight of the new estimate, in (0, 1]"})
    learning_rate: float = field(default=1e-6, metadata={"help": "our own default"})


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package as a wheel lays it out, with one recipe: folders inside it, none beside it."""
    site = tmp_path_factory.mktemp("site")
    package = site / "llm_xrisk"
    (package / "recipes").mkdir(parents=True)
    for name in ("__init__.py", "cli.py", "cli_help.py"):
        shutil.copy(ROOT / "llm_xrisk" / name, package / name)
    shutil.copytree(ROOT / "accelerate_configs", package / "accelerate_configs")
    (package / "recipes" / "dft.py").write_text(RECIPE)
    return site


def llm_xrisk(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-m", "llm_xrisk.cli", *arguments],
        cwd=site,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_help_has_one_line_for_every_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for verb, line in cli.VERBS.items():
        assert f"{verb} {line}" in words


def test_no_verb_prints_the_help_and_succeeds(capsys):
    assert cli.main([]) == 0
    assert "disco" in capsys.readouterr().out


def test_an_unknown_verb_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["dtf"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "'dtf'" in message and "'dft'" in message


def test_an_unknown_accelerate_config_lists_the_shipped_ones():
    with pytest.raises(ValueError, match=r"got accelerate_config 'zero4'.*zero2_cpu, zero3"):
        cli.accelerate_config_path("zero4")


def test_an_accelerate_config_may_be_a_path(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("distributed_type: 'NO'\n")
    assert cli.accelerate_config_path(str(mine)) == mine


def test_launch_options_come_from_the_file_and_the_command_line_wins(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("accelerate_config: zero3\nnum_processes: 4\ngamma: 0.9\n")
    arguments = ["--config", str(config), "--num_processes", "2", "--gamma", "0.8"]
    options, rest = cli.split_arguments(arguments)
    assert options == {"accelerate_config": "zero3", "num_processes": "2"}
    assert rest == ["--config", str(config), "--gamma", "0.8"]


def test_a_shipped_file_is_named_by_its_verb_alone():
    _, rest = cli.split_arguments(["--config", "disco", "--max_steps", "3"])
    assert rest[0] == "--config" and rest[2:] == ["--max_steps", "3"]
    assert rest[1].endswith("recipes/disco.yaml")


def test_a_file_of_that_name_comes_before_the_shipped_one(tmp_path, monkeypatch):
    (tmp_path / "disco").write_text("output_dir: out\n")
    monkeypatch.chdir(tmp_path)
    assert cli.split_arguments(["--config", "disco"])[1] == ["--config", "disco"]


def test_a_config_file_that_is_a_list_is_refused(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("- gamma\n")
    with pytest.raises(ValueError, match=r"got list in .*run.yaml; need"):
        cli.split_arguments(["--config", str(config)])


def test_a_missing_config_file_is_named_without_a_traceback(installed, tmp_path, capsys):
    result = llm_xrisk(installed, "dft", "--config", "nope.yaml")
    assert result.returncode == 2
    assert "got --config nope.yaml, which is no file" in result.stderr
    assert "Traceback" not in result.stderr
    with pytest.raises(SystemExit):  # the recipe by itself
        RecipeParser(Method).parse_args_and_config(["--config", str(tmp_path / "nope.yaml")])
    assert "nope.yaml" in capsys.readouterr().err


def test_a_broken_config_file_is_named_without_a_traceback(installed, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("gamma: [1\n")
    result = llm_xrisk(installed, "dft", "--config", str(config))
    assert result.returncode == 2
    assert "run.yaml, which is no YAML" in result.stderr and "line 1" in result.stderr
    assert "Traceback" not in result.stderr
    with pytest.raises(SystemExit):
        RecipeParser(Method).parse_args_and_config(["--config", str(config)])
    assert "line 1" in capsys.readouterr().err


def test_a_setting_out_of_range_is_told_without_a_traceback(tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path), "--objective", "DTF"]
    with pytest.raises(SystemExit):
        RecipeParser(DFTConfig).parse_args_and_config(arguments)
    assert "error: objective must be" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("a/b", "a/b")])
def test_resuming_from_the_last_checkpoint_is_a_word_on_the_command_line(tmp_path, text, value):
    arguments = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", text, "--use_cpu"]
    (args,) = RecipeParser(DFTConfig).parse_args_and_config(arguments)
    assert args.resume_from_checkpoint == value


def test_no_launch_option_hides_a_training_argument():
    """Launch options are taken away from the recipe, so they must not be its own."""
    assert not set(cli.LAUNCH_OPTIONS) & set(TrainingArguments.__dataclass_fields__)


def test_the_cpu_configurations_bring_the_training_arguments_they_need():
    for name, extra in cli.CPU_ARGUMENTS.items():
        head = (ROOT / "accelerate_configs" / f"{name}.yaml").read_text()
        assert " ".join(extra) in head
    assert set(cli.CPU_ARGUMENTS) == {
        path.stem for path in (ROOT / "accelerate_configs").glob("*cpu.yaml")
    }


def test_env_prints_the_version_of_everything_that_matters(capsys):
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("transformers 5.") for line in lines)
    assert len(lines) == len(cli.PACKAGES.split()) + 3


def test_importing_the_command_line_imports_no_torch():
    code = "import sys, llm_xrisk.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_missing_recipe_is_named_with_what_to_do(installed):
    result = llm_xrisk(installed, "disco", "--config", "x.yaml")
    assert result.returncode == 2
    assert "got the verb 'disco', but there is no recipe at" in result.stderr
    assert "reinstall llm-xrisk" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_verb_launches_its_recipe_with_file_and_arguments(installed, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"answer: {tmp_path}/answer\ngamma: 0.9\naccelerate_config: single\n")
    result = llm_xrisk(installed, "dft", "--config", str(config), "--gamma", "0.8")
    assert result.returncode == 0, result.stderr
    seen = json.loads((tmp_path / "answer0").read_text())
    assert seen["gamma"] == 0.8
    assert seen["world_size"] in (None, "1")


def test_a_recipe_that_fails_fails_the_command(installed):
    result = llm_xrisk(installed, "dft", "--accelerate_config", "single", "--answr", "x")
    assert result.returncode != 0
    assert "llm-xrisk dft: error: the following arguments are required: --answer" in result.stderr


@pytest.mark.dist
def test_the_cpu_configuration_starts_two_processes_on_the_cpu(installed, tmp_path):
    answer = f"{tmp_path}/answer"
    result = llm_xrisk(installed, "dft", "--accelerate_config", "cpu", "--answer", answer)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        seen = json.loads(Path(f"{answer}{rank}").read_text())
        assert seen == {"answer": answer, "gamma": 0.5, "use_cpu": True, "world_size": "2"}


def test_verb_help_is_the_recipes_own_under_the_typed_name(installed):
    result = llm_xrisk(installed, "dft", "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: llm-xrisk dft [--config FILE.yaml]")
    assert "Where the answer goes." in result.stdout


@pytest.mark.parametrize("verb", [v for v in cli.VERBS if (ROOT / f"recipes/{v}.py").is_file()])
def test_every_recipe_in_the_repository_prints_its_help(verb):
    result = llm_xrisk(ROOT, verb, "--help")
    assert result.returncode == 0, result.stderr
    assert f"usage: llm-xrisk {verb}" in result.stdout


def test_own_settings_come_first_and_inherited_ones_last():
    text = RecipeParser(Method).format_help()
    own, inherited = text.split("\nTrainingArguments:")
    assert "How answers are weighed." in own
    assert "--gamma" in own
    assert "our own default" in own  # a changed default is ours, not inherited
    assert "--weight_decay" in inherited and "--weight_decay" not in own
    assert inherited.count("\n  --") > 100


def test_settings_nobody_declares_are_refused(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {tmp_path}\ngama: 0.9\n")
    with pytest.raises(SystemExit):
        RecipeParser(Method).parse_args_and_config(["--config", str(config)])
    error = capsys.readouterr().err
    assert "got --gama 0.9; need settings that --help lists: did you mean --gamma?" in error


def test_a_misspelled_launch_option_is_told_its_name(capsys):
    for written, meant in (("--confg", "--config"), ("--accelerate_confg", "--accelerate_config")):
        with pytest.raises(SystemExit):
            RecipeParser(Method).parse_args_and_config(["--output_dir", "x", written, "zero3"])
        assert f"did you mean {meant}?" in capsys.readouterr().err


def test_launch_options_in_the_file_do_not_disturb_the_recipe(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {tmp_path}\naccelerate_config: zero3\ngamma: 0.9\n")
    (method,) = RecipeParser(Method).parse_args_and_config(["--config", str(config)])
    assert method.gamma == 0.9
