import pytest

from llm_xrisk.rollout import SamplingConfig, TransformersEngine, make_engine, row_seed
from llm_xrisk.rollout.engine import mix64


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be finite and not negative, got -0.5"),
        ({"temperature": float("nan")}, "got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_k": -1}, "top_k must not be negative, got -1"),
    ],
)
def test_a_sampling_field_outside_its_range_is_refused(field, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**field)


def test_mix64_is_the_splitmix64_finaliser():
    # The published first output of splitmix64 from state 0 is the finaliser of one golden step.
    assert mix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_row_seeds_differ_in_every_argument_and_fit_63_bits():
    arguments = [
        (seed, sample, generation, version)
        for seed in (0, 1, -1)
        for sample in (0, 1, 2, 1 << 40)
        for generation in range(4)
        for version in range(4)
    ]
    seeds = {row_seed(*numbers) for numbers in arguments}
    assert len(seeds) == len(arguments)
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@pytest.fixture(scope="module")
def engine(tiny_model):
    return TransformersEngine(tiny_model())


@pytest.mark.parametrize(
    ("prompts", "sample_ids", "options", "message"),
    [
        ([], [], {}, "got no prompts"),
        ([[5], []], [0, 1], {}, "prompt 1 is empty"),
        (
            [[5], [96]],
            [0, 1],
            {},
            "prompt 1 has token ids from 96 to 96, the model's go from 0",
        ),
        (
            [[5] * 60],
            [0],
            {},
            "has 60 tokens and 8 are to follow, but the context holds 64",
        ),
        ([[5]], [0, 1], {}, "got 2 sample_ids for 1 prompts"),
        ([[5]], [0], {"num_generations": 0}, "num_generations must be at least 1, got 0"),
    ],
)
def test_a_request_the_model_cannot_serve_is_refused(engine, prompts, sample_ids, options, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, SamplingConfig(max_new_tokens=8), sample_ids=sample_ids, **options)


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[5]], [[6], [7]], "got 2 completions for 1 prompts"),
        ([[5]], [[]], "completion 0 is empty"),
        ([[5]], [[6, 99]], "completion 0 has token ids from 6 to 99"),
        ([[5] * 60], [[6] * 5], "the context holds 64"),
    ],
)
def test_a_completion_that_cannot_be_scored_is_refused(engine, prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        engine.log_probs(prompts, completions)


def test_the_whole_context_can_be_used(engine):
    batch = engine.generate([[5] * 60], SamplingConfig(max_new_tokens=4), sample_ids=[0])
    assert len(engine.log_probs(batch.prompt_ids, batch.completion_ids)[0]) <= 4


def test_rows_are_prompt_major(engine, prompts):
    batch = engine.generate(
        prompts, SamplingConfig(max_new_tokens=2), sample_ids=[7, 8, 9, 9], num_generations=2
    )
    assert batch.sample_ids == [7, 7, 8, 8, 9, 9, 9, 9]
    assert batch.prompt_ids == [prompt for prompt in prompts for _ in range(2)]
    assert len(batch) == 8


def test_make_engine_knows_its_engines(tiny_model):
    assert isinstance(make_engine("transformers", tiny_model(), batch_size=3), TransformersEngine)
    with pytest.raises(ValueError, match="unknown rollout engine 'hf'; choose 'transformers' or"):
        make_engine("hf", tiny_model())
