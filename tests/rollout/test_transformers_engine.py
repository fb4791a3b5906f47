import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm_xrisk.rollout import SamplingConfig, TransformersEngine
from llm_xrisk.rollout.weight_sync import largest_difference

SAMPLING = SamplingConfig(max_new_tokens=12, seed=3)
IDS = [10, 11, 12, 13]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


def rollout(model, prompts, *, ids=IDS, sampling=SAMPLING, generations=3, **options):
    engine = TransformersEngine(model, **options)
    return engine.generate(prompts, sampling, sample_ids=ids, num_generations=generations)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_rollouts_do_not_depend_on_the_batch_size(model, prompts, batch_size):
    batch = rollout(model, prompts, batch_size=batch_size)
    expected = rollout(model, prompts, batch_size=5)
    assert batch.completion_ids == expected.completion_ids
    assert largest_difference(batch.log_probs, expected.log_probs) < 1e-5


def test_rollouts_do_not_depend_on_the_order_or_company_of_prompts(model, prompts):
    expected = rollout(model, prompts)
    order = [2, 0, 3]
    shuffled = rollout(model, [prompts[i] for i in order], ids=[IDS[i] for i in order])
    wanted = [expected.completion_ids[3 * i + j] for i in order for j in range(3)]
    assert shuffled.completion_ids == wanted


def test_a_prompt_alone_needs_no_padding_and_draws_the_same(model, prompts):
    expected = rollout(model, prompts)
    for number, prompt in enumerate(prompts):
        alone = rollout(model, [prompt], ids=[IDS[number]])
        assert alone.completion_ids == expected.completion_ids[3 * number : 3 * number + 3]


def test_rollouts_change_with_seed_sample_id_generation_and_version(model, prompts):
    base = rollout(model, prompts[:1], ids=[1], generations=2)
    other_seed = rollout(model, prompts[:1], ids=[1], sampling=SamplingConfig(12, seed=4))
    other_id = rollout(model, prompts[:1], ids=[2])
    engine = TransformersEngine(model)
    engine.sync(model, version=1)
    other_version = engine.generate(prompts[:1], SAMPLING, sample_ids=[1])
    rows = [*base.completion_ids, other_seed.completion_ids[0], other_id.completion_ids[0]]
    rows.append(other_version.completion_ids[0])
    assert len({tuple(row) for row in rows}) == 5
    assert (base.policy_version, other_version.policy_version) == (0, 1)


def test_the_global_random_generator_is_neither_read_nor_moved(model, prompts):
    before = torch.get_rng_state()
    first = rollout(model, prompts)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    assert rollout(model, prompts).completion_ids == first.completion_ids


@torch.no_grad()
def test_first_tokens_follow_the_softmax_of_the_model(model, chi_square):
    sampling = SamplingConfig(max_new_tokens=1, temperature=1.5)
    batch = rollout(model, [[5, 6]], ids=[0], sampling=sampling, generations=8000, batch_size=4000)
    counts = torch.bincount(torch.tensor(batch.completion_ids)[:, 0], minlength=96)
    logits = model(torch.tensor([[5, 6]])).logits[0, -1]
    assert abs(chi_square(counts, (logits / 1.5).softmax(-1))) < 4
    assert chi_square(counts, logits.softmax(-1)) > 10


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_recorded_log_probs_are_those_of_a_plain_forward_pass(model, prompts, temperature):
    sampling = SamplingConfig(max_new_tokens=12, temperature=temperature, top_p=0.9)
    batch = rollout(model, prompts, sampling=sampling)
    for prompt, completion, scores in zip(
        batch.prompt_ids, batch.completion_ids, batch.log_probs, strict=True
    ):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor([completion]).T)
        torch.testing.assert_close(torch.tensor(scores), expected[:, 0], atol=2e-5, rtol=0)


def test_teacher_forced_log_probs_equal_the_recorded_ones(model, prompts):
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.6)
    batch = rollout(model, prompts, sampling=sampling)
    engine = TransformersEngine(model, batch_size=5)
    scored = engine.log_probs(batch.prompt_ids, batch.completion_ids, temperature=0.6)
    assert largest_difference(scored, batch.log_probs) < 2e-5
    other = engine.log_probs(batch.prompt_ids, batch.completion_ids)
    assert largest_difference(other, batch.log_probs) > 0.1


@torch.no_grad()
def test_greedy_takes_the_likeliest_token_every_time(model):
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.0)
    batch = rollout(model, [[5, 6, 7]], ids=[0], sampling=sampling, generations=2)
    tokens = [5, 6, 7]
    for token in batch.completion_ids[0]:
        assert token == model(torch.tensor([tokens])).logits[0, -1].argmax().item()
        tokens.append(token)
    assert batch.completion_ids[0] == batch.completion_ids[1]


def test_a_completion_ends_with_its_first_end_of_sequence_id_iff_it_stopped(model, prompts):
    eos = [1, 17, 40]
    sampling = SamplingConfig(max_new_tokens=12)
    batch = rollout(model, prompts, sampling=sampling, generations=20, eos_token_ids=eos)
    assert set(batch.finish_reasons) == {"stop", "length"}
    for tokens, scores, reason in zip(
        batch.completion_ids, batch.log_probs, batch.finish_reasons, strict=True
    ):
        assert len(tokens) == len(scores) >= 1
        assert not set(tokens[:-1]) & set(eos)
        assert (tokens[-1] in eos) == (reason == "stop")
        assert reason == "stop" or len(tokens) == 12


def test_end_of_sequence_ids_come_from_generation_config_and_tokenizer(tiny_model):
    class Tokenizer:
        eos_token_id, pad_token_id = 9, 2

    model = tiny_model()
    model.generation_config.eos_token_id = [1, 7]
    engine = TransformersEngine(model, Tokenizer())
    assert (engine.eos_token_ids, engine.pad_token_id) == ([1, 7, 9], 2)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(ValueError, match="found no end-of-sequence id"):
        TransformersEngine(model)


def test_a_checkpoints_own_generation_config_does_not_bend_the_policy(tiny_model, prompts):
    model = tiny_model()
    expected = rollout(model, prompts)
    model.generation_config = GenerationConfig(
        eos_token_id=1, do_sample=True, repetition_penalty=5.0, min_new_tokens=12, top_k=1
    )
    kept = model.generation_config
    batch = rollout(model, prompts)
    assert batch.completion_ids == expected.completion_ids
    assert model.generation_config is kept


def test_each_module_comes_back_in_the_mode_it_was_in(tiny_model, prompts):
    model = tiny_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    engine = TransformersEngine(model)
    batch = engine.generate(prompts, SAMPLING, sample_ids=IDS)
    engine.log_probs(batch.prompt_ids, batch.completion_ids)
    assert [module.training for module in model.modules()] == modes


def test_dropout_is_off_while_sampling(tiny_model, prompts):
    model = tiny_model()
    expected = rollout(model, prompts)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert rollout(model.train(), prompts).completion_ids == expected.completion_ids


def test_gradient_checkpointing_leaves_the_cache_on_and_the_rollouts_equal(tiny_model, prompts):
    model = tiny_model()
    expected = rollout(model, prompts)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False  # what Trainer does
    widths = []
    hook = model.model.embed_tokens.register_forward_pre_hook(
        lambda _, arguments: widths.append(arguments[0].shape[1])
    )
    assert rollout(model.train(), prompts).completion_ids == expected.completion_ids
    hook.remove()
    assert widths.count(1) == len(widths) - 1  # one prefill, then one token at a time
    assert model.config.use_cache is False


def test_a_peft_model_generates_with_its_adapter(tiny_model, prompts):
    base = rollout(tiny_model(), prompts)
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    assert rollout(model, prompts).completion_ids == base.completion_ids  # LoRA starts at nothing
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    batch = rollout(model, prompts)
    assert batch.completion_ids != base.completion_ids
    merged = rollout(model.merge_and_unload(), prompts)
    assert batch.completion_ids == merged.completion_ids


def test_the_engine_follows_the_live_model_and_sync_names_the_version(tiny_model, prompts):
    model, other = tiny_model(), tiny_model(seed=1)
    engine = TransformersEngine(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.5)
    assert (
        engine.generate(prompts, SAMPLING, sample_ids=IDS).completion_ids
        == rollout(model, prompts, generations=1).completion_ids
    )
    engine.sync(torch.compile(other, backend="eager"), version=5)
    assert engine.model is other
    assert engine.policy_version == 5
    engine.close()
    assert engine.model is None


def test_progress_counts_every_row_once(model, prompts):
    steps = []
    TransformersEngine(model, batch_size=5).generate(
        prompts, SAMPLING, sample_ids=IDS, num_generations=3, on_progress=steps.append
    )
    assert steps == [5, 5, 2]


def test_parameters_are_gathered_around_generation_and_scoring(model, prompts):
    calls = []

    class Gather:
        def __init__(self, gathered):
            calls.append(gathered)

        def __enter__(self):
            calls.append("open")

        def __exit__(self, *_):
            calls.append("closed")

    engine = TransformersEngine(model, gather=Gather)
    engine.generate(prompts, SAMPLING, sample_ids=IDS)
    engine.log_probs([[5]], [[6]])
    assert calls == [model, "open", "closed"] * 2


def test_a_batch_size_below_one_is_refused(model):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TransformersEngine(model, batch_size=0)


def test_the_shipped_model_answers_its_own_steps(tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(tiny_model_path), tokenizer)
    prompt = tokenizer("48/2=", add_special_tokens=False).input_ids
    sampling = SamplingConfig(max_new_tokens=12)
    batch = engine.generate([prompt], sampling, sample_ids=[0], num_generations=50)
    answers = [tokenizer.decode(c, skip_special_tokens=True) for c in batch.completion_ids]
    assert all(answer.strip().isascii() for answer in answers)
    assert batch.finish_reasons.count("stop") > 40
    scored = engine.log_probs(batch.prompt_ids, batch.completion_ids)
    assert largest_difference(scored, batch.log_probs) < 1e-4
