"""TRL's trainers and ours in one pipeline: same rows, same reward, each from the last one's folder.

SFT (TRL), DFT, DPO (TRL), DisCO, GRPO (TRL), TempNet, one step each. With LoRA every stage trains
an adapter of its own, which is merged before the next: the policy it starts from, its reference
where it has one, is then a plain model, and TRL's trainers and ours need to know nothing of each
other's adapters.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from llm_xrisk.data.load import load_rows
from llm_xrisk.models.tempnet import TempNet
from llm_xrisk.serving import TempNetLogitsProcessor
from llm_xrisk.trainers import DFTConfig, DFTTrainer, DisCOConfig, DisCOTrainer, RolloutConfig
from llm_xrisk.trainers.merge import merge
from llm_xrisk.trainers.tempnet import TempNetTrainer
from llm_xrisk.trainers.tempnet_config import TempNetTrainingConfig
from reward import arithmetic_reward

COMMON: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}
GRPO = {"num_generations": 4, "max_completion_length": 8, "generation_batch_size": 32}
ROLLOUT = RolloutConfig(max_new_tokens=8, temperature=1.0, num_generations=4, updates_per_rollout=2)
STAGES = ["sft", "dft", "dpo", "disco", "grpo", "tempnet"]
PROMPTS = ["48/2=", "12+7=", "9*9="]
WITHOUT_THE_PACKAGE = """
import importlib.metadata, json, sys
sys.modules["llm_xrisk"] = sys.modules["reward"] = None  # an import of either fails
installed = importlib.metadata.distributions
importlib.metadata.distributions = lambda **chosen: (  # and vLLM finds no plugin of ours
    part for part in installed(**chosen) if part.name != "llm-xrisk"
)
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    settings = {"max_model_len": 64, "enforce_eager": True, "gpu_memory_utilization": 0.15}
    model = LLM(model=sys.argv[1], dtype="float32", enable_lora=True, **settings)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0)
    def answers(adapter):
        outputs = model.generate(sys.argv[3:], greedy, lora_request=adapter)
        found = [output.outputs[0] for output in outputs]
        scores = [[next(iter(p.values())).logprob for p in answer.logprobs] for answer in found]
        return {"tokens": [list(answer.token_ids) for answer in found], "scores": scores}
    print(json.dumps([answers(None), answers(LoRARequest("adapter", 1, sys.argv[2]))]))
"""


def lora(mode: str) -> LoraConfig | None:
    if mode == "full":
        return None
    return LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")


def trainer_of(stage: str, model: str, output: Path, rows: Dataset, mode: str) -> Any:
    """A stage's trainer from the folder of the stage before; nothing is converted on the way."""
    given: dict[str, Any] = {"train_dataset": rows, "peft_config": lora(mode)}
    place = {"output_dir": str(output)}
    if stage == "sft":
        return SFTTrainer(model, args=SFTConfig(**place, **COMMON), **given)
    if stage == "dft":
        return DFTTrainer(model, DFTConfig(**place, **COMMON, num_negatives=1), **given)
    if stage == "dpo":
        return DPOTrainer(model, args=DPOConfig(**place, **COMMON), **given)
    if stage == "disco":
        args = DisCOConfig(**place, **COMMON)
        return DisCOTrainer(model, args, reward_funcs=arithmetic_reward, rollout=ROLLOUT, **given)
    if stage == "grpo":
        args = GRPOConfig(**place, **COMMON, **GRPO)
        return GRPOTrainer(model, reward_funcs=arithmetic_reward, args=args, **given)
    frozen = {"learning_rate": None, "tempnet_learning_rate": 1e-3}
    own = {"entropy": 1.0, "tempnet_hidden_size": 16}
    args = TempNetTrainingConfig(**place, **(COMMON | frozen), **own)
    return TempNetTrainer(model, args, train_dataset=rows)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


class Stage:
    """What a stage left: its own weights as they were in memory, and where they were saved."""

    def __init__(self, name: str, start: str, folder: Path, rows: Dataset, mode: str) -> None:
        self.start, self.saved = start, folder / name
        trainer = trainer_of(name, start, self.saved, rows, mode)
        model = trainer.net if name == "tempnet" else trainer.model
        before = weights_of(model)
        trainer.train()
        self.weights = weights_of(model)
        self.moved = moved(before, self.weights)
        trainer.save_model()
        self.merged = name == "tempnet" or mode == "lora"
        self.next = folder / f"{name}-merged" if self.merged else self.saved
        if self.merged:
            merge(self.saved, self.next)


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """One data set for all stages: `prompt` and `completion`, a preference, an `answer`."""
    table = load_rows("gsm8k_steps", limit=64)
    wrong = {"chosen": table["completion"][:], "rejected": [f"{a}7" for a in table["answer"]]}
    for name, column in wrong.items():
        table = table.add_column(name, column)
    return table


@pytest.fixture(scope="module", params=["full", "lora"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(
    mode: str, rows: Dataset, tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Stage]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, start = tmp_path_factory.mktemp(mode), tiny_model_path
    done: dict[str, Stage] = {}
    for name in STAGES:
        done[name] = Stage(name, start, folder, rows, mode)
        start = str(done[name].next)
    return done


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_a_stage_moves_the_weights_and_its_folder_holds_the_very_ones(
    pipeline: dict[str, Stage], mode: str, stage: str
) -> None:
    done = pipeline[stage]
    auto: Any = AutoPeftModelForCausalLM if mode == "lora" else AutoModelForCausalLM
    found = weights_of(auto.from_pretrained(done.saved))
    assert done.moved
    assert all(("lora_" in name) == (mode == "lora") for name in done.moved)
    assert found.keys() == done.weights.keys()
    assert not moved(done.weights, found)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_stage_starts_from_the_last_ones_folder(
    pipeline: dict[str, Stage], tiny_model_path: str, stage: str
) -> None:
    previous = pipeline[STAGES[STAGES.index(stage) - 1]]
    assert pipeline[stage].start == str(previous.next)
    policy = weights_of(AutoModelForCausalLM.from_pretrained(previous.next))
    base = weights_of(AutoModelForCausalLM.from_pretrained(previous.start))
    assert policy.keys() == base.keys()
    assert moved(policy, base)
    assert (previous.next / "tokenizer_config.json").is_file()


def test_the_rows_serve_every_stage_as_they_are(rows: Dataset, pipeline: dict[str, Stage]) -> None:
    columns = {"prompt", "completion", "chosen", "rejected", "answer", "id", "index"}
    assert set(rows.column_names) == columns
    assert rows[0]["prompt"] == "48/2=" and rows[0]["answer"] == "24"


def test_the_last_folder_generates_at_the_temperatures_of_its_tempnet(
    pipeline: dict[str, Stage],
) -> None:
    last = pipeline["tempnet"]
    assert not moved(last.weights, weights_of(TempNet.from_pretrained(last.next)))
    assert last.moved
    model = AutoModelForCausalLM.from_pretrained(last.next)
    policy = AutoModelForCausalLM.from_pretrained(last.start)
    assert not moved(weights_of(policy), weights_of(model))
    tokenizer = AutoTokenizer.from_pretrained(last.next)
    processor = TempNetLogitsProcessor.from_pretrained(last.next)
    processor.check(model.generation_config)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    settings = {"do_sample": True, "max_new_tokens": 8, "logits_processor": [processor]}
    texts = tokenizer.batch_decode(model.generate(**inputs, **settings), skip_special_tokens=True)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, PROMPTS, strict=True))


def answers(model: Any, folder: Path) -> dict[str, Any]:
    """Greedy answers to :data:`PROMPTS` as token ids, and their log-probs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: dict[str, Any] = {"tokens": [], "scores": []}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = model.generate(input_ids=ids, do_sample=False, max_new_tokens=8)
        answer = output[0, ids.shape[1] :]
        with torch.no_grad():
            log_probs = model(input_ids=output).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        found["tokens"].append(answer.tolist())
        found["scores"].append(log_probs.gather(-1, answer[:, None]).flatten().tolist())
    return found


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("mode", ["lora"], indirect=True)
def test_vllm_serves_the_last_folder_and_an_adapter_without_this_package(
    pipeline: dict[str, Stage], tmp_path: Path
) -> None:
    folder, adapter = pipeline["tempnet"].next, pipeline["disco"].saved
    script = tmp_path / "serve.py"
    script.write_text(WITHOUT_THE_PACKAGE)
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(adapter), *PROMPTS],
        cwd=tmp_path,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = answers(model, folder)
    adapted = answers(PeftModel.from_pretrained(model, adapter), folder)
    found = json.loads(done.stdout.splitlines()[-1])
    for served, wanted in zip(found, (plain, adapted), strict=True):
        assert served["tokens"] == wanted["tokens"]
        for scores, expected in zip(served["scores"], wanted["scores"], strict=True):
            assert scores == pytest.approx(expected, abs=1e-4)
    # one step of DisCO moves them by far more than that
    assert adapted["scores"][1] != pytest.approx(plain["scores"][1], abs=2e-3)
