import sys
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_xrisk.rollout.vllm_engine as vllm_engine
from llm_xrisk.rollout import SamplingConfig, TransformersEngine, make_engine
from llm_xrisk.rollout.scoring import sequence_log_probs
from llm_xrisk.rollout.vllm_engine import VLLMEngine
from llm_xrisk.rollout.vllm_process import process_state_kept
from llm_xrisk.rollout.weight_sync import largest_difference, make_probe

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.vllm,
]
IDS = [10, 11, 12, 13]


@pytest.fixture(scope="module")
def engines(tiny_model):
    """A tied and an untied model, each with its engine; two starts for the whole module."""
    pairs = {}
    for tied in (True, False):
        model = tiny_model(tied=tied)
        pairs[tied] = (model, VLLMEngine(model, block_size=32, enable_prefix_caching=True))
    yield pairs
    for _, engine in pairs.values():
        engine.close()
        engine.close()  # a second time changes nothing
    assert not dist.is_initialized()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture
def pair(engines, tied):
    return engines[tied]


def perturb(model, seed):
    """A new policy, changed in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * parameter.std().nan_to_num(1.0).clamp(min=0.05) * noise)


def difference(model, engine):
    probe = make_probe(96, num_sequences=4, length=20)
    expected = sequence_log_probs(model, probe.prompts, probe.completions)
    return largest_difference(engine.log_probs(probe.prompts, probe.completions), expected)


def test_log_probs_equal_the_trainers_after_three_successive_updates(pair):
    model, engine = pair
    for version in (1, 2, 3):
        perturb(model, version)
        assert difference(model, engine) > 0.1  # not synced yet
        engine.sync(model, version=version)
        assert difference(model, engine) < 1e-4
        assert engine.policy_version == version


def test_without_the_refresh_a_tied_head_stays_stale_and_the_check_raises(pair, tied, monkeypatch):
    model, engine = pair
    monkeypatch.setattr(vllm_engine, "refresh_tied_heads", lambda _: 0)
    perturb(model, 10)
    if not tied:
        engine.sync(model, version=4)  # an untied head arrives in the stream
        return
    with pytest.raises(RuntimeError, match="it serves other weights than those"):
        engine.sync(model, version=4)
    monkeypatch.undo()
    engine.sync(model, version=4)
    assert difference(model, engine) < 1e-4


def test_the_check_can_be_left_out(engines, monkeypatch):
    model, engine = engines[True]
    monkeypatch.setattr(vllm_engine, "refresh_tied_heads", lambda _: 0)
    monkeypatch.setattr(engine, "check", False)
    perturb(model, 11)
    engine.sync(model, version=5)
    assert difference(model, engine) > 0.1
    monkeypatch.undo()
    engine.sync(model, version=5)


def test_a_sync_forgets_the_cache_of_the_old_policy(engines):
    model, engine = engines[True]
    prompt, greedy = list(range(2, 50)), SamplingConfig(max_new_tokens=4, temperature=0.0)
    engine.generate([prompt], greedy, sample_ids=[0])
    perturb(model, 12)
    engine.sync(model, version=6)
    batch = engine.generate([prompt], greedy, sample_ids=[0])
    scored = sequence_log_probs(model, batch.prompt_ids, batch.completion_ids)
    assert largest_difference(batch.log_probs, scored) < 1e-4


def test_an_adapter_is_served_merged_and_its_base_model_is_left_alone(engines, tiny_model):
    _, engine = engines[True]
    peft = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", r=4))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    before = {name: p.detach().clone() for name, p in peft.named_parameters()}
    engine.sync(peft.train(), version=7)
    assert difference(peft, engine) < 1e-4
    assert difference(tiny_model(), engine) > 0.1
    assert peft.training
    assert all(torch.equal(p, before[name]) for name, p in peft.named_parameters())
    engine.sync(engines[True][0], version=7)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(max_new_tokens=10),
        SamplingConfig(max_new_tokens=10, temperature=0.6),
        SamplingConfig(max_new_tokens=10, temperature=0.6, top_k=5, top_p=0.8),
        SamplingConfig(max_new_tokens=10, temperature=0.0),
    ],
    ids=["plain", "cool", "truncated", "greedy"],
)
def test_recorded_log_probs_are_the_trainers_before_truncation(pair, prompts, sampling):
    model, engine = pair
    batch = engine.generate(prompts, sampling, sample_ids=IDS, num_generations=3)
    scored = TransformersEngine(model).log_probs(
        batch.prompt_ids, batch.completion_ids, temperature=sampling.temperature
    )
    assert largest_difference(batch.log_probs, scored) < 1e-4
    own = engine.log_probs(batch.prompt_ids, batch.completion_ids, temperature=sampling.temperature)
    assert largest_difference(own, scored) < 1e-4


def test_scoring_at_another_temperature_leaves_no_trace(pair):
    model, engine = pair
    engine.log_probs([[5]], [[6, 7]], temperature=0.7)
    assert difference(model, engine) < 1e-4


@torch.no_grad()
def test_first_tokens_follow_the_softmax_of_the_model(engines, chi_square):
    model, engine = engines[False]
    sampling = SamplingConfig(max_new_tokens=1, temperature=1.5)
    batch = engine.generate([[5, 6]], sampling, sample_ids=[0], num_generations=3000)
    counts = torch.bincount(torch.tensor(batch.completion_ids)[:, 0], minlength=96)
    logits = model(torch.tensor([[5, 6]])).logits[0, -1]
    assert abs(chi_square(counts, (logits / 1.5).softmax(-1))) < 4
    assert chi_square(counts, logits.softmax(-1)) > 10


def test_greedy_takes_what_the_transformers_engine_takes(pair, prompts):
    model, engine = pair
    greedy = SamplingConfig(max_new_tokens=10, temperature=0.0)
    batch = engine.generate(prompts, greedy, sample_ids=IDS)
    expected = TransformersEngine(model).generate(prompts, greedy, sample_ids=IDS)
    assert batch.completion_ids == expected.completion_ids
    assert batch.finish_reasons == expected.finish_reasons


def test_rollouts_depend_on_seed_sample_and_version_and_on_no_company(engines, prompts):
    model, engine = engines[True]
    sampling = SamplingConfig(max_new_tokens=10)
    base = engine.generate(prompts, sampling, sample_ids=IDS, num_generations=2)
    assert base.sample_ids == [10, 10, 11, 11, 12, 12, 13, 13]
    torch.manual_seed(99)
    alone = engine.generate(prompts[2:3], sampling, sample_ids=IDS[2:3], num_generations=2)
    assert alone.completion_ids == base.completion_ids[4:6]
    assert base.completion_ids[4] != base.completion_ids[5]
    other = engine.generate(prompts, sampling, sample_ids=[1, 2, 3, 4], num_generations=2)
    assert other.completion_ids != base.completion_ids
    engine.sync(model, version=engine.policy_version + 1)
    later = engine.generate(prompts, sampling, sample_ids=IDS, num_generations=2)
    assert later.completion_ids != base.completion_ids
    assert later.policy_version == base.policy_version + 1


def test_a_completion_ends_with_its_first_end_of_sequence_id_iff_it_stopped(
    engines, prompts, monkeypatch
):
    _, engine = engines[False]
    monkeypatch.setattr(engine, "eos_token_ids", [1, 17, 40])
    sampling = SamplingConfig(max_new_tokens=10)
    batch = engine.generate(prompts, sampling, sample_ids=IDS, num_generations=20)
    assert set(batch.finish_reasons) == {"stop", "length"}
    for tokens, scores, reason in zip(
        batch.completion_ids, batch.log_probs, batch.finish_reasons, strict=True
    ):
        assert len(tokens) == len(scores) >= 1
        assert not set(tokens[:-1]) & {1, 17, 40}
        assert (tokens[-1] in {1, 17, 40}) == (reason == "stop")
        assert reason == "stop" or len(tokens) == 10


def test_the_trainers_random_state_threads_and_launcher_variables_are_kept(
    engines, prompts, monkeypatch
):
    _, engine = engines[True]
    monkeypatch.setenv("MASTER_PORT", "4242")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    before, set_num_threads = torch.get_rng_state(), torch.set_num_threads
    engine.generate(prompts, SamplingConfig(max_new_tokens=4), sample_ids=IDS)
    assert torch.equal(before, torch.get_rng_state())
    with process_state_kept():
        torch.manual_seed(7)
        torch.set_num_threads = print
        monkeypatch.setenv("MASTER_PORT", "1")
        monkeypatch.setenv("RANK", "3")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.set_num_threads is set_num_threads
    assert vllm_engine.os.environ["MASTER_PORT"] == "4242"
    assert "RANK" not in vllm_engine.os.environ


def test_progress_counts_every_row_once(engines, prompts):
    steps = []
    engines[True][1].generate(
        prompts,
        SamplingConfig(max_new_tokens=1),
        sample_ids=IDS,
        num_generations=200,
        on_progress=steps.append,
    )
    assert sum(steps) == 800
    assert len(steps) > 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 0 is empty"),
        ([5] * 60, "prompt 0 has 60 tokens and 8 are to follow, but the context holds 63"),
        ([96], "prompt 0 has token ids from 96 to 96"),
    ],
)
def test_a_prompt_the_model_cannot_continue_is_refused(engines, prompt, message):
    with pytest.raises(ValueError, match=message):
        engines[True][1].generate([prompt], SamplingConfig(max_new_tokens=8), sample_ids=[0])


def test_the_whole_context_can_be_scored(pair):
    _, engine = pair
    assert len(engine.log_probs([[5] * 3], [[6] * 60])[0]) == 60


def test_a_missing_vllm_says_what_to_install(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'pip install "llm-xrisk\[cpu\]"'):
        VLLMEngine(tiny_model())


def test_an_engine_before_the_process_group_is_refused(tiny_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="2 processes were launched"):
        VLLMEngine(tiny_model())


def test_the_shipped_model_is_served_from_its_path(engines, tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    engine = make_engine("vllm", tiny_model_path, max_model_len=48)
    assert engine.eos_token_ids == TransformersEngine(model, tokenizer).eos_token_ids
    prompt = tokenizer("48/2=", add_special_tokens=False).input_ids
    batch = engine.generate(
        [prompt], SamplingConfig(max_new_tokens=12), sample_ids=[0], num_generations=20
    )
    assert batch.finish_reasons.count("stop") > 15
    scored = sequence_log_probs(model, batch.prompt_ids, batch.completion_ids)
    assert largest_difference(batch.log_probs, scored) < 1e-4
    perturb(model, 1)
    engine.sync(model, version=1)
    engine.close()
    assert difference(*engines[True]) < 1e-4  # one engine's end is not the others'


def test_an_engine_whose_first_sync_fails_is_closed(engines, tiny_model, monkeypatch):
    alive = VLLMEngine._alive
    monkeypatch.setattr(vllm_engine, "refresh_tied_heads", lambda _: 0)
    with pytest.raises(RuntimeError, match="it serves other weights than those"):
        VLLMEngine(tiny_model())
    assert VLLMEngine._alive == alive
    assert difference(*engines[True]) < 1e-4
