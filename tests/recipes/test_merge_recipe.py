"""Hand-over: what a folder holds, what comes out of it, and what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_xrisk.models.tempnet import TempNet
from llm_xrisk.trainers import merge as merging
from llm_xrisk.trainers.merge import Merged, merge
from tests.launched import sharded_checkpoints
from tests.trainers.build import LORA, dft_trainer, tiny_model, tokenizer

ROOT = Path(__file__).parents[2]
IDS = torch.arange(3, 40).view(1, -1)
# what PEFT says of adapters on embeddings, in saving and in loading them
OF_PEFT = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:Model with `tie_word_embeddings=True`:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)


def causal() -> LoraConfig:
    """A new one each time: PEFT writes the base model into it."""
    return LoraConfig(**LORA, task_type="CAUSAL_LM")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("base") / "base-model")


def adapted(base: Path, config: Any = None, seed: int = 0) -> Any:
    """An adapter that changes the model far beyond rounding."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config or causal())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save(adapted(base), tmp_path / "adapter")


def test_a_merged_adapter_is_the_adapter_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    wanted = logits(AutoPeftModelForCausalLM.from_pretrained(adapter))
    assert float((wanted - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max()) > 1
    found = merge(adapter, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert found.source.kind == "adapter" and found.dtype == "float32"
    assert found.merging <= found.tolerance and found.difference <= found.tolerance
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert not list(tmp_path.glob("out.*"))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokens.chat_template == tokenizer().chat_template
    assert model.generation_config.eos_token_id == 1


def test_weights_are_rounded_once_and_written_as_they_are(adapter: Path, tmp_path: Path) -> None:
    exact = merge(adapter, tmp_path / "float32")
    found = merge(adapter, tmp_path / "bfloat16", dtype="bfloat16")
    assert found.dtype == "bfloat16"
    assert found.merging == exact.merging < 1e-4 < found.difference
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "float32").state_dict()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").state_dict()
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)


@OF_PEFT
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_an_adapter_on_tied_layers_unties_them(
    base: Path, tmp_path: Path, targets: list[str]
) -> None:
    config = LoraConfig(r=4, target_modules=[*targets, "q_proj"], task_type="CAUSAL_LM")
    adapter = save(adapted(base, config), tmp_path / "adapter")
    wanted = logits(AutoPeftModelForCausalLM.from_pretrained(adapter))
    merge(adapter, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


@OF_PEFT
def test_tokens_that_were_added_with_the_adapter_are_in_the_merged_model(
    base: Path, tmp_path: Path
) -> None:
    tokens = AutoTokenizer.from_pretrained(base)
    tokens.add_tokens(["<think>", "</think>"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokens))
    config = replace(causal(), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(model, config)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    tokens.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == 104 == len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)


def test_generation_ends_at_the_end_token_that_came_with_the_adapter(
    adapter: Path, tmp_path: Path
) -> None:
    tokens = AutoTokenizer.from_pretrained(adapter)
    tokens.eos_token = "<|assistant|>"
    tokens.save_pretrained(adapter)
    merge(adapter, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [tokens.eos_token_id, 1]


def test_a_model_is_handed_over_bit_for_bit(base: Path, tmp_path: Path) -> None:
    source = save(tiny_model(3).bfloat16(), tmp_path / "checkpoint-7")
    (source / "optimizer.pt").write_bytes(b"state of the run")
    found = merge(source, tmp_path / "out")
    assert (found.difference, found.dtype) == (0.0, "bfloat16")
    before = AutoModelForCausalLM.from_pretrained(source).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
    assert {"generation_config.json", "README.md"} <= files and "optimizer.pt" not in files


def test_a_tempnet_comes_along_and_one_by_itself_gets_its_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    net = TempNet(102, rho=1.0, hidden_size=8)
    net.save_pretrained(adapter)
    alone = TempNet(102, rho=1.0, hidden_size=8, base_model=str(base))
    alone.save_pretrained(tmp_path / "alone")
    assert merge(adapter, tmp_path / "both").source.tempnet
    found = merge(tmp_path / "alone", tmp_path / "whole")
    assert (found.source.kind, found.difference) == ("TempNet", 0.0)
    for folder, wanted in (("both", net), ("whole", alone)):
        read = TempNet.from_pretrained(tmp_path / folder)
        assert read.config.base_model is None
        for name, value in wanted.state_dict().items():
            assert torch.equal(read.state_dict()[name], value)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")),
        logits(AutoModelForCausalLM.from_pretrained(base)),
    )


def test_a_tempnet_of_another_vocabulary_is_refused(base: Path, tmp_path: Path) -> None:
    TempNet(77, rho=1.0, base_model=str(base)).save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match="vocabulary of 77, the model has 102"):
        merge(tmp_path / "net", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_card_comes_along_without_the_adapter(base: Path, tmp_path: Path) -> None:
    trainer = dft_trainer(tmp_path / "run", model=str(base), peft_config=causal(), max_steps=1)
    trainer.train()
    trainer.save_model()
    merge(tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "transformers" and "llm-xrisk" in head["tags"]
    assert "objective DFT" in text and "| gamma_decay_epochs | 0.0 |" in text
    assert "The adapter is merged into `base-model`" in text
    assert str(tmp_path) not in text


def test_a_card_with_the_path_of_the_base_model_does_not_keep_it(
    base: Path, tmp_path: Path
) -> None:
    trainer = dft_trainer(tmp_path / "run", model=str(base), peft_config=causal(), max_steps=1)
    trainer.model.save_pretrained(tmp_path / "adapter")  # with the card of PEFT
    tokenizer().save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"base_model: {base}" in card
    (tmp_path / "adapter" / "README.md").write_text(card.replace("[More Information", "[No"))
    merge(tmp_path / "adapter", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in head and "lora" not in head.get("tags", [])
    assert not any(tag.startswith("base_model:") for tag in head.get("tags", []))


def test_a_failed_check_leaves_nothing_behind(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match=r"logits differ by .* need at most 0"):
        merge(adapter, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_folders_without_weights_are_told_what_they_lack(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="which is no folder; need that of an adapter"):
        merge(tmp_path / "nowhere", tmp_path / "out")
    run = tmp_path / "run"
    save(tiny_model(), run / "checkpoint-5")
    with pytest.raises(FileNotFoundError, match=r"it holds checkpoint-5: .*run/checkpoint-5"):
        merge(run, tmp_path / "out")
    (tmp_path / "fsdp" / "pytorch_model_fsdp_0").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="accelerate merge-weights"):
        merge(tmp_path / "fsdp", tmp_path / "out")
    torn = save(adapted(base), tmp_path / "torn")
    (torn / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no whole adapter_model\.safetensors; need"):
        merge(torn, tmp_path / "out")


def test_a_base_that_has_moved_is_asked_for_and_taken(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    missing = {"/gone/model": "no model here", None: "does not name", "some/name": "of the hub"}
    for name, message in missing.items():
        path.write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(FileNotFoundError, match=rf"{message}.*--base_model MODEL"):
            merge(adapter, tmp_path / "out")
    found = merge(adapter, tmp_path / "out", base_model=str(base))
    assert found.source.base == str(base)


def test_an_output_that_holds_something_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty; need a new folder"):
        merge(adapter, out)
    with pytest.raises(FileExistsError, match="holds no model; --overwrite replaces models alone"):
        merge(adapter, out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    merge(adapter, out)
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier model")
    with pytest.raises(FileExistsError, match="--overwrite true to replace the model"):
        merge(adapter, out)
    assert merge(adapter, out, overwrite=True, dtype="float16").dtype == "float16"
    assert not list(out.glob("model-*")) and sorted(tmp_path.iterdir()) == [adapter, out]


def test_folders_inside_each_other_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(adapter)
    places = (adapter, adapter / "out", tmp_path, base, base / "merged", link, link / "out")
    for place in places:
        with pytest.raises(ValueError, match="a model to read; need a folder apart from it"):
            merge(adapter, place, overwrite=True)
    assert (adapter / "adapter_model.safetensors").is_file() and (base / "config.json").is_file()


def test_what_has_no_merged_weights_is_refused(base: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompt = save(get_peft_model(tiny_model(), config), tmp_path / "prompt")
    with pytest.raises(ValueError, match="PROMPT_TUNING for CAUSAL_LM; need one of a language"):
        merge(prompt, tmp_path / "out", base_model=str(base))
    quantised = save(tiny_model(), tmp_path / "quantised")
    settings = json.loads((quantised / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(settings))
    adapter = save(adapted(base), tmp_path / "adapter")
    with pytest.raises(ValueError, match="weights are quantised; need the unquantised model"):
        merge(adapter, tmp_path / "out", base_model=str(quantised))
    with pytest.raises(ValueError, match="got dtype='int8', need one of float32, bfloat16"):
        merge(adapter, tmp_path / "out", dtype="int8")


def command_line(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.dist
def test_the_command_says_how_exact_it_was(adapter: Path, tmp_path: Path) -> None:
    command = ("-m", "llm_xrisk.cli", "merge", adapter, tmp_path / "out", "--dtype", "bfloat16")
    done = command_line(*command)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"reading the adapter {adapter} on ")
    assert "largest difference" in lines[-2] and "tolerance" in lines[-2]
    assert "23,968 parameters in bfloat16; read back bit for bit" in lines[-1]


def test_the_command_tells_an_error_without_a_traceback(adapter: Path) -> None:
    done = command_line(ROOT / "recipes" / "merge.py", adapter, adapter / "out")
    assert done.returncode == 2
    assert "merge.py: error: got output" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.dist
def test_shards_of_zero_3_are_put_together(
    accelerate_launch: Callable[..., str], base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    save(tiny_model(), tmp_path / "model")
    accelerate_launch(
        "zero3_cpu",
        sharded_checkpoints.__file__,
        str(tmp_path),
        launch_arguments=("--zero3_save_16bit_model", "false"),
    )
    found: dict[str, Merged] = {}
    for run in ("full", "lora"):
        checkpoint = tmp_path / run / "checkpoint-1"
        assert (checkpoint / "latest").is_file() and not (checkpoint / "model.safetensors").exists()
        found[run] = merge(checkpoint, tmp_path / f"{run}-merged")
        wanted = torch.load(tmp_path / f"{run}.pt")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{run}-merged")
        weights = dict(model.named_parameters())
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
        assert not torch.equal(
            weights["model.layers.0.self_attn.q_proj.weight"],
            dict(tiny_model().named_parameters())["model.layers.0.self_attn.q_proj.weight"],
        )
    assert found["full"].source.sharded and found["lora"].source.kind == "adapter"
