import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn

from llm_xrisk.rollout import SamplingConfig, TransformersEngine
from llm_xrisk.rollout.scoring import sequence_log_probs
from llm_xrisk.rollout.weight_sync import (
    check_sync,
    iter_named_parameters,
    largest_difference,
    make_probe,
    unwrap_model,
)


def with_adapter(model, **options):
    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=4, **options)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    return peft


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_model_streams_its_checkpoint(tiny_model, tied):
    model = tiny_model(tied=tied)
    streamed = dict(iter_named_parameters(model))
    expected = dict(model.named_parameters())
    assert list(streamed) == list(expected)
    assert ("lm_head.weight" in streamed) == (not tied)
    for name, value in streamed.items():
        assert torch.equal(value, expected[name])
        assert value.data_ptr() != expected[name].data_ptr()  # the receiver may keep it
        assert not value.requires_grad


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_wrappers_leave_no_trace_in_the_names(tiny_model, wrap):
    model = tiny_model()
    assert unwrap_model(wrap(model)) is model
    assert [n for n, _ in iter_named_parameters(wrap(model))] == [
        n for n, _ in model.named_parameters()
    ]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_streams_as_the_merged_model(tiny_model, options):
    peft = with_adapter(tiny_model(tied=False), **options)
    if "modules_to_save" in options:
        with torch.no_grad():
            peft.base_model.model.lm_head.modules_to_save.default.weight.mul_(1.5)
    streamed = dict(iter_named_parameters(peft))
    merged = dict(peft.merge_and_unload().named_parameters())
    assert streamed.keys() == merged.keys()
    for name, value in streamed.items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)


def test_streaming_leaves_a_bfloat16_base_bit_for_bit_as_it_was(tiny_model):
    peft = with_adapter(tiny_model().bfloat16())
    before = {name: p.detach().clone() for name, p in peft.named_parameters()}
    plain_merge_moves_it = False
    for _ in range(3):
        for _ in iter_named_parameters(peft):
            pass
    for name, parameter in peft.named_parameters():
        assert torch.equal(parameter, before[name])
    peft.merge_adapter()
    peft.unmerge_adapter()
    plain_merge_moves_it = any(
        not torch.equal(parameter, before[name]) for name, parameter in peft.named_parameters()
    )
    assert plain_merge_moves_it  # what the restoration is there for


def test_an_abandoned_stream_unmerges_the_layer_it_stopped_in(tiny_model):
    peft = with_adapter(tiny_model())
    before = {name: p.detach().clone() for name, p in peft.named_parameters()}
    stream = iter_named_parameters(peft)
    while "q_proj" not in next(stream)[0]:
        pass
    stream.close()
    assert all(torch.equal(p, before[name]) for name, p in peft.named_parameters())
    assert not any(getattr(m, "merged", False) for m in peft.modules())


def test_a_model_can_be_trained_on_after_a_stream_read_in_inference_mode(tiny_model):
    peft = with_adapter(tiny_model(), use_dora=True)
    with torch.inference_mode():  # vLLM consumes the stream in there
        for _ in iter_named_parameters(peft):
            pass
    peft.train()
    peft(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(not p.is_inference() for p in peft.parameters())


def test_prompt_learning_cannot_be_merged_and_says_so(tiny_model):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PrefixTuningConfig learns a prompt"):
        next(iter_named_parameters(get_peft_model(tiny_model(), config)))


def test_parameters_are_gathered_layer_by_layer(tiny_model):
    peft = with_adapter(tiny_model())
    sizes = []

    class Gather:
        def __init__(self, parameters):
            sizes.append(len(parameters))

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    names = [name for name, _ in iter_named_parameters(peft, gather=Gather)]
    assert len(sizes) == len(names)  # this model has one parameter per layer
    assert sorted(set(sizes)) == [1, 3]  # weight alone; weight with lora_A and lora_B


def test_the_probe_is_fixed_and_within_the_vocabulary():
    probe = make_probe(96)
    assert probe == make_probe(96)
    assert [len(p) + len(c) for p, c in zip(probe.prompts, probe.completions, strict=True)] == [
        12,
        12,
    ]
    rows = [*probe.prompts, *probe.completions]
    assert all(0 <= token < 96 for row in rows for token in row)
    assert len({token for row in rows for token in row}) > 15


def test_the_check_passes_on_equal_weights_and_names_the_difference_on_others(tiny_model):
    model, probe = tiny_model(), make_probe(96)
    served = tiny_model()
    engine = TransformersEngine(served)
    expected = sequence_log_probs(model, probe.prompts, probe.completions)
    assert check_sync(engine, expected, probe) < 1e-5
    with torch.no_grad():
        served.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    worst = largest_difference(engine.log_probs(probe.prompts, probe.completions), expected)
    with pytest.raises(RuntimeError, match=f"by up to {worst:.3g} nats, more than 0.0001"):
        check_sync(engine, expected, probe)
    assert check_sync(engine, expected, probe, tolerance=2 * worst) == worst


def test_a_nan_never_passes_the_check():
    assert largest_difference([[0.0, float("nan")]], [[0.0, 0.0]]) == float("inf")


def test_an_adapter_loaded_from_its_directory_generates_as_the_one_saved(tiny_model, tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    saved = with_adapter(type(base).from_pretrained(tmp_path / "base"))
    saved.save_pretrained(tmp_path / "adapter")
    loaded = type(base).from_pretrained(tmp_path / "adapter")  # transformers' own way of adapters
    assert hasattr(loaded, "peft_config") and not hasattr(loaded, "get_base_model")
    batches = [
        TransformersEngine(model).generate(
            [[5, 6, 7]], SamplingConfig(max_new_tokens=8), sample_ids=[0], num_generations=4
        )
        for model in (saved, loaded)
    ]
    assert batches[0].completion_ids == batches[1].completion_ids
