"""A TempNet in vLLM: in an engine of this process, and the processor by itself."""

import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_xrisk.models.tempnet import TempNet
from llm_xrisk.rollout.vllm_engine import VLLMEngine
from llm_xrisk.serving import TempNetLogitsProcessor, divide_logits
from tests.serving.vllm_servers import expected_log_probs, tempnet

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]
V = 12
PROMPTS = [[5, 6, 7], [9, 14], [20, 21, 22, 23, 24, 25]]


@pytest.fixture(scope="module")
def folder(tiny_model_path, tmp_path_factory) -> Path:
    """A model with a TempNet beside it."""
    found = tmp_path_factory.mktemp("with") / "model"
    shutil.copytree(tiny_model_path, found)
    tempnet(AutoModelForCausalLM.from_pretrained(found).config.vocab_size).save_pretrained(found)
    return found


def read(folder: Path) -> tuple[Any, TempNet]:
    """The model and its TempNet, for transformers."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), TempNet.from_pretrained(folder)


def start(model: Path | str, **options: Any) -> VLLMEngine:
    settings: dict[str, Any] = {"additional_config": {}, "max_num_seqs": 4, "max_logprobs": -1}
    return VLLMEngine(str(model), **settings | options)


@pytest.fixture(scope="module")
def running(folder) -> Iterator[VLLMEngine]:
    """An engine on that folder, which finds the TempNet itself."""
    engine = start(folder)
    yield engine
    engine.close()


@pytest.fixture
def engine() -> Iterator[Callable[..., VLLMEngine]]:
    """Builds engines that end with the test."""
    started: list[VLLMEngine] = []

    def started_here(model: Path | str, **options: Any) -> VLLMEngine:
        started.append(start(model, **options))
        return started[-1]

    yield started_here
    for one in started:
        one.close()


def run(engine: VLLMEngine, requests: list[dict[str, Any]]) -> list[tuple[list[int], Tensor]]:
    """Token ids and the log-probs of the whole vocabulary at each, of all requests together."""
    from vllm import SamplingParams

    common = {"logprobs": -1, "detokenize": False, "ignore_eos": True}
    parameters = [
        SamplingParams(**{k: v for k, v in r.items() if k != "prompt"}, **common) for r in requests
    ]
    rows = [{"prompt_token_ids": r["prompt"]} for r in requests]
    outputs = [o.outputs[0] for o in engine.llm.generate(rows, parameters, use_tqdm=False)]
    return [
        (list(o.token_ids), torch.tensor([[d[k].logprob for k in sorted(d)] for d in o.logprobs]))
        for o in outputs
    ]


def close(found: Tensor, wanted: Tensor, error: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=error, atol=error)


def test_each_row_keeps_its_wish_while_rows_end_and_move(folder, running):
    """Four rows at a time, of eighteen requests of unequal length: all are looked up by row."""
    model, net = read(folder)
    kinds = [({}, net), ({"extra_args": {"tempnet": False}}, None), ({"temperature": 0.0}, None)]
    requests = [
        {"prompt": PROMPTS[k % 2], "max_tokens": 3 + 5 * k % 17, **kinds[k % 3][0]}
        for k in range(18)
    ]
    for k, (tokens, found) in enumerate(run(running, requests)):
        wanted = expected_log_probs(model, requests[k]["prompt"], tokens, kinds[k % 3][1])
        close(found, wanted)


def test_masks_come_first_and_min_p_and_penalties_after(folder, running):
    model, net = read(folder)
    prompt = PROMPTS[0]
    allowed, penalised, cut = run(
        running,
        [
            {"prompt": prompt, "max_tokens": 1, "allowed_token_ids": [5, 7, 9, 20]},
            {"prompt": prompt, "max_tokens": 1, "repetition_penalty": 1.5},
            {"prompt": prompt, "max_tokens": 1, "min_p": 0.2},
        ],
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[:, -1]
    masked = torch.full_like(logits, -torch.inf)
    masked[:, [5, 7, 9, 20]] = logits[:, [5, 7, 9, 20]]
    processor = TempNetLogitsProcessor(net)
    ids = torch.tensor([prompt])
    close(allowed[1].exp(), processor(ids, masked).softmax(-1))
    divided = processor(ids, logits)
    later = divided.clone()
    later[:, prompt] = torch.where(later > 0, later / 1.5, later * 1.5)[:, prompt]
    close(penalised[1], later.log_softmax(-1))
    shares = divided.softmax(-1)
    kept = shares * (shares >= 0.2 * shares.amax())
    close(cut[1].exp(), kept / kept.sum())


def test_bfloat16_logits_are_read_as_they_are_sampled_from(folder, engine):
    net = TempNet.from_pretrained(folder)
    requests = [
        {"prompt": PROMPTS[0], "max_tokens": 1, "extra_args": {"tempnet": wish}}
        for wish in (True, False)
    ]
    found, plain = (log_probs for _, log_probs in run(engine(folder, dtype="bfloat16"), requests))
    # tau does not change with a shift of the logits, so log-probs serve as well
    close(found, divide_logits(plain, net(plain).detach()).log_softmax(-1))
    assert (found - plain).abs().max() > 0.01


def test_a_model_without_a_tempnet_is_served_as_if_the_plugin_were_not_there(
    tiny_model_path, folder, engine
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()
    left_out = {"additional_config": {"tempnet": False}}
    for path, options in ((tiny_model_path, {}), (folder, left_out)):
        running = engine(path, **options)
        batch = running.llm.llm_engine.model_executor.driver_worker.worker.model_runner.input_batch
        names = [type(processor).__name__ for processor in batch.logitsprocs.all]
        assert names.count("TempNetVLLMProcessor") == 1
        requests = [{"prompt": p, "max_tokens": 6} for p in PROMPTS]
        for request, (tokens, found) in zip(requests, run(running, requests), strict=True):
            close(found, expected_log_probs(model, request["prompt"], tokens, None))


def test_a_tempnet_of_another_vocabulary_ends_the_start(tiny_model_path, tmp_path, engine):
    tempnet(7).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads a vocabulary of 7, the model has"):
        engine(tiny_model_path, additional_config={"tempnet": str(tmp_path)})


def config(model: Path | str, setting: Any = None, **changes: Any) -> Any:
    """What the processor reads of vLLM's configuration."""
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(model), get_vocab_size=lambda: V),
        additional_config={} if setting is None else {"tempnet": setting},
        **{"speculative_config": None} | changes,
    )


def parameters(temperature: float = 1.0, **extra_args: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=temperature, extra_args=extra_args or None)


@pytest.fixture
def small(tmp_path) -> Path:
    """The folder of a TempNet of 12 tokens."""
    tempnet(V).save_pretrained(tmp_path)
    return tmp_path


def processor_of(model: Path | str, place: Any = "cpu", **options: Any) -> Any:
    from llm_xrisk.serving import TempNetVLLMProcessor

    return TempNetVLLMProcessor(config(model, **options), place)


def test_without_a_tempnet_nothing_is_done_and_nothing_raises():
    for name in ("Qwen/Qwen2.5-0.5B", "s3://bucket/model", "x" * 5000, "\0", ""):
        processor = processor_of(name)
        processor.update_state(None)
        logits = torch.full((2, 5), torch.nan)
        assert processor.apply(logits) is logits
        assert processor.add_request(0, parameters()) is False
        processor.apply_staged_writes()


def test_drafts_are_refused_with_a_tempnet_and_no_business_of_it_without(small):
    processor_of("model", speculative_config=object())
    processor_of(small, setting="none", speculative_config=object())
    with pytest.raises(ValueError, match="speculative decoding with the TempNet of"):
        processor_of(small, speculative_config=object())


def test_one_request_with_nan_or_infinite_logits_leaves_the_others_alone(small):
    processor = processor_of(small)
    processor.tempered = dict.fromkeys(range(4), True)
    logits = 4 * torch.randn(4, V)
    logits[1, 3], logits[2, 5], logits[3, 2] = torch.nan, torch.inf, -torch.inf
    found = processor.apply(logits.clone())
    assert torch.equal(found[1:3].nan_to_num(), logits[1:3].nan_to_num())
    wanted = TempNetLogitsProcessor(TempNet.from_pretrained(small))(None, logits[[0, 3]])
    close(found[[0, 3]], wanted)


@pytest.mark.parametrize("rows", [3, 70])
def test_more_rows_than_a_step_of_generation_has_are_divided_too(small, rows):
    processor = processor_of(small)
    processor.tempered = dict.fromkeys(range(rows), True)
    logits = 4 * torch.randn(rows, V)
    wanted = TempNetLogitsProcessor(TempNet.from_pretrained(small))(None, logits)
    with torch.inference_mode():
        close(processor.apply(logits.clone()), wanted)


def test_model_runner_v2_takes_the_plugin_and_its_slots(small):
    """V2 needs a GPU; its loader, its validator and its context do not."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.worker.gpu.sample import logits_processor as v2

    validate = v2.build_custom_logits_processors_params_validator(None)
    validate(parameters(tempnet="True"))
    with pytest.raises(VLLMValidationError, match="need true to sample at the temperatures"):
        validate(parameters(tempnet="on"))
    slots: Any = SimpleNamespace(
        **{"device": torch.device("cpu"), "max_num_reqs": 6, "vocab_size": V},
        **dict.fromkeys(("all_token_ids", "prompt_len", "prefill_len", "total_len")),
    )
    built = v2.build_custom_logits_processors(config(small), slots, False)
    (processor,) = [p for p in built if type(p).__name__ == "TempNetVLLMProcessor"]
    assert isinstance(processor, v2.LogitsProcessor)
    wishes = {4: parameters(), 1: parameters(tempnet=False), 2: parameters(0.0), 5: parameters()}
    took = [processor.add_request(slot, wish) for slot, wish in wishes.items()]
    assert took == [True, False, False, True]
    processor.apply_staged_writes()

    def apply(rows: list[int], logits: Tensor) -> Tensor:
        mapping = torch.tensor(rows)
        context: Any = v2.LogitsContext(mapping, mapping, np.array(rows), *[None] * 4)
        return processor.apply(logits.clone(), context)

    logits = 4 * torch.randn(4, V)
    found = apply([1, 5, 2, 4], logits)
    divided = TempNetLogitsProcessor(TempNet.from_pretrained(small))(None, logits)
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    close(found[[1, 3]], divided[[1, 3]])
    assert torch.equal(apply([2, 1], logits[:2]), logits[:2])
    assert processor.add_request(4, parameters(tempnet=0)) is False  # the slot's next request
    processor.apply_staged_writes()
    assert torch.equal(apply([1, 5, 2, 4], logits)[3], logits[3])
