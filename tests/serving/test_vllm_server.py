"""``llm-xrisk serve`` with a real vLLM over HTTP: an adapter and its TempNet, on one server."""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llm_xrisk.models.tempnet import TempNet
from tests.serving.vllm_servers import (
    Server,
    completion_of,
    expected_log_probs,
    log_probs_of,
    members,
    served,
    tempnet,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]
PROMPTS = [[5, 6, 7], [9, 14], [20, 21, 22, 23, 24, 25]]
TOLERANCE = 1e-5


class Deployed:
    """A base model, an adapter on it, the adapter's TempNet, and the server of all three."""

    def __init__(self, base: Path, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        self.vocab_size: int = model.config.vocab_size
        self.base, self.folder = base, folder
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
        self.model: Any = get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0.0, 0.2, generator=generator)
        self.model.save_pretrained(folder)
        self.net: TempNet = tempnet(self.vocab_size)
        self.net.save_pretrained(folder)
        self.server: Server

    def ask(self, prompt: list[int], model: Path | None = None, **options: Any) -> dict[str, Any]:
        settings = {"max_tokens": 8, "logprobs": self.vocab_size, "ignore_eos": True} | options
        status, answer = self.server.post(
            "/v1/completions", model=str(model or self.folder), prompt=prompt, **settings
        )
        assert status == 200, answer
        return answer["choices"][0]

    def differs(
        self, prompt: list[int], choice: dict[str, Any], net: TempNet | None, **options: Any
    ) -> float:
        """Largest difference of an answer's log-probs from transformers', relative above 1."""
        wanted = expected_log_probs(self.model, prompt, completion_of(choice), net, **options)
        gap = (log_probs_of(choice, self.vocab_size) - wanted).abs() / wanted.abs().clamp(min=1)
        return gap.max().item()


@pytest.fixture(scope="module")
def deployed(tiny_model_path, tmp_path_factory) -> Iterator[Deployed]:
    root = tmp_path_factory.mktemp("served")
    base = Path(shutil.copytree(tiny_model_path, root / "base"))
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    found = Deployed(base, root / "adapter")
    options = ["--dtype", "float32", "--logprobs-mode", "processed_logprobs"]
    with served(found.folder, root / "log", *options) as server:
        found.server = server
        yield found


def test_it_says_what_it_serves(deployed):
    first, second = deployed.server.log.read_text().splitlines()[:2]
    assert first == (
        f"{deployed.folder}: the adapter on {deployed.base}, with the TempNet of "
        f"{deployed.folder} (temperatures 0.2 to 3), requests at temperature 1, not the 0.7 of "
        "its generation_config.json"
    )
    assert "--host 127.0.0.1" in second and "--max-lora-rank 8" in second
    assert set(deployed.server.models()) == {str(deployed.folder), str(deployed.base)}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_log_probs_are_those_of_transformers_at_the_temperatures(deployed, prompt):
    choice = deployed.ask(prompt)
    assert deployed.differs(prompt, choice, deployed.net) < TOLERANCE
    assert deployed.differs(prompt, choice, None) > 0.01  # one can tell


def test_the_temperature_of_a_request_multiplies(deployed):
    choice = deployed.ask(PROMPTS[0], temperature=0.5)
    assert deployed.differs(PROMPTS[0], choice, deployed.net, temperature=0.5) < TOLERANCE


def test_top_p_acts_on_the_divided_logits(deployed):
    choice = deployed.ask(PROMPTS[0], top_p=0.7, max_tokens=1)
    wanted = expected_log_probs(deployed.model, PROMPTS[0], [0], deployed.net)[0].exp()
    shares = wanted.sort(descending=True)
    kept = shares.indices[shares.values.cumsum(0) - shares.values < 0.7]
    found = log_probs_of(choice, deployed.vocab_size)[0]
    # the server writes log 0 as -9999
    assert set((found > -1000).nonzero().flatten().tolist()) == set(kept.tolist())


def test_samples_follow_the_softmax_at_the_temperature(deployed, chi_square):
    count, plain_rejected = 1500, 0
    for prompt in PROMPTS[:2]:
        status, answer = deployed.server.post(
            "/v1/completions",
            **{"model": str(deployed.folder), "prompt": prompt, "n": count, "seed": 11},
            **{"max_tokens": 1, "logprobs": 0, "ignore_eos": True},
        )
        assert status == 200, answer
        drawn = torch.tensor([completion_of(choice)[0] for choice in answer["choices"]])
        counts = torch.bincount(drawn, minlength=deployed.vocab_size)
        assert counts.sum() == count
        tempered, plain = (
            expected_log_probs(deployed.model, prompt, [0], net)[0].exp()
            for net in (deployed.net, None)
        )
        assert chi_square(counts, tempered) < 4
        plain_rejected += chi_square(counts, plain) > 8
    assert plain_rejected  # the test tells the two apart


def test_greedy_is_unchanged_and_so_are_its_log_probs(deployed):
    for prompt in PROMPTS:
        choice = deployed.ask(prompt, temperature=0)
        out = deployed.ask(prompt, temperature=0, vllm_xargs={"tempnet": 0})
        assert completion_of(choice) == completion_of(out)
        assert deployed.differs(prompt, choice, None) < TOLERANCE


def test_a_request_opts_out_beside_others_that_do_not(deployed):
    """Together in a batch, of unequal lengths, so that rows end and move."""
    wishes = [{}, {"tempnet": False}, {"tempnet": "none"}, {"tempnet": 1}] * 4
    prompts = [PROMPTS[k % 3] for k in range(len(wishes))]

    def ask(k: int) -> dict[str, Any]:
        length = 5 + 7 * k % 23
        return deployed.ask(prompts[k], vllm_xargs=wishes[k], max_tokens=length, temperature=1)

    with ThreadPoolExecutor(len(wishes)) as pool:
        choices = list(pool.map(ask, range(len(wishes))))
    for prompt, wish, choice in zip(prompts, wishes, choices, strict=True):
        net = None if wish and wish["tempnet"] in (False, "none") else deployed.net
        assert deployed.differs(prompt, choice, net) < TOLERANCE


def test_a_wish_that_is_neither_yes_nor_no_is_refused(deployed):
    status, answer = deployed.server.post(
        "/v1/completions",
        **{"model": str(deployed.folder), "prompt": PROMPTS[0], "vllm_xargs": {"tempnet": "on"}},
    )
    assert status == 400
    assert "tempnet='on' of the request; need true" in answer["error"]["message"]


def test_chat_requests_are_served_too(deployed):
    status, answer = deployed.server.post(
        "/v1/chat/completions",
        **{"model": str(deployed.folder), "max_tokens": 3},
        messages=[{"role": "user", "content": "48/2="}],
    )
    assert status == 200 and answer["usage"]["completion_tokens"] >= 1


def test_ctrl_c_ends_the_server_and_what_it_started(deployed):
    group = deployed.server.process.pid
    assert len(members(group)) >= 2
    deployed.server.interrupt()
    for _ in range(60):
        if not members(group):
            break
        time.sleep(0.5)
    assert members(group) == []
