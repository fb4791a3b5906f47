"""Where answers start and end, and how rows get their index."""

import logging
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llm_xrisk.data.fingerprint import model_fingerprint, tokenizer_fingerprint
from llm_xrisk.data.gsm8k_steps import tiny_model_path
from llm_xrisk.data.tokenize import completion_content, encode_prompt, encode_prompt_completion
from llm_xrisk.data.with_index import IndexedDataset, with_index

USER = [{"role": "user", "content": "48/2="}]
ANSWER = [{"role": "assistant", "content": "24"}]

# As Zephyr's, which the authors of DFT used: a header line, and a newline behind the turn's end.
HEADER_AND_NEWLINE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TWO_ENDS = HEADER_AND_NEWLINE.replace("eos_token + '\n'", "eos_token + '\n' + eos_token")
NO_GENERATION_PROMPT = HEADER_AND_NEWLINE.split("{% if")[0]
NO_HEADER = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[' + m['content'] + ']' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
OWN_TURN_END = HEADER_AND_NEWLINE.replace("eos_token", "'<|unknown|>'")


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_model_path())


@pytest.fixture(scope="module")
def merging_tokenizer():
    """A BPE tokenizer that knows "48" as one token, so that "4" + "8" merge."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["48 48 48 448 448"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def texts(tokenizer, *args, **kwargs):
    return tuple(
        tokenizer.decode(ids) for ids in encode_prompt_completion(tokenizer, *args, **kwargs)
    )


def test_plain_completion_ends_in_one_end_of_sequence(tokenizer):
    assert texts(tokenizer, "48/2=", "24") == ("48/2=", "24<|end|>")


def test_end_of_sequence_already_in_the_text_is_not_doubled(tokenizer):
    assert texts(tokenizer, "48/2=", "24<|end|>") == ("48/2=", "24<|end|>")
    assert texts(tokenizer, USER, "24<|end|>")[1] == "24<|end|>"


def test_truncated_completion_has_no_end_of_sequence(tokenizer):
    assert texts(tokenizer, "48/2=", "24", add_eos=False)[1] == "24"
    assert texts(tokenizer, USER, ANSWER, add_eos=False)[1] == "24"


def test_conversation_goes_through_the_chat_template(tokenizer):
    opened = "<|user|>48/2=<|end|><|assistant|>"
    assert texts(tokenizer, USER, ANSWER) == (opened, "24<|end|>")


@pytest.mark.parametrize("template", [HEADER_AND_NEWLINE, TWO_ENDS, NO_GENERATION_PROMPT])
def test_header_and_what_follows_the_end_are_no_part_of_the_completion(tokenizer, template):
    tokenizer.chat_template = template
    prompt, completion = texts(tokenizer, USER, ANSWER)
    assert completion == "24<|end|>"
    assert prompt.endswith("<|assistant|>\n")
    assert tokenizer.decode(encode_prompt(tokenizer, USER)) == prompt


def test_template_without_any_header_keeps_the_whole_answer(tokenizer):
    tokenizer.chat_template = NO_HEADER
    assert texts(tokenizer, USER, ANSWER) == ("[48/2=]", "24<|end|>")


def test_turn_that_ends_in_another_special_token_ends_there(tokenizer):
    tokenizer.chat_template = OWN_TURN_END
    assert texts(tokenizer, USER, ANSWER)[1] == "24<|unknown|>"
    newline = tokenizer.convert_tokens_to_ids("\n")
    assert texts(tokenizer, USER, ANSWER, eos_token_ids=[newline])[1] == "24<|unknown|>\n"


def test_truncating_a_turn_with_another_end_leaves_the_text(tokenizer):
    tokenizer.chat_template = OWN_TURN_END
    assert texts(tokenizer, USER, ANSWER, add_eos=False)[1] == "24"


def test_begun_answer_is_continued(tokenizer):
    begun = [*USER, {"role": "assistant", "content": "2"}]
    assert texts(tokenizer, begun, "4") == ("<|user|>48/2=<|end|><|assistant|>2", "4<|end|>")


def test_system_prompt_replaces_the_conversations_own(tokenizer):
    spoken = [{"role": "system", "content": "Be right."}, *USER]
    for prompt in (USER, spoken):
        ids = encode_prompt(tokenizer, prompt, "Be wrong.")
        assert tokenizer.decode(ids).startswith("<|system|>Be wrong.<|end|><|user|>48/2=")


def test_system_prompt_stands_before_plain_text(tokenizer):
    assert tokenizer.decode(encode_prompt(tokenizer, "48/2=", "Be wrong.")) == "Be wrong.\n\n48/2="


def test_chat_template_kwargs_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ mood }}" + HEADER_AND_NEWLINE
    prompt, _ = texts(tokenizer, USER, ANSWER, chat_template_kwargs={"mood": "calm"})
    assert prompt.startswith("calm<|user|>")


def test_merge_across_the_boundary_moves_the_start_and_warns_once(merging_tokenizer, caplog):
    merging_tokenizer.name_or_path = "merges"
    with caplog.at_level(logging.WARNING, logger="llm_xrisk.data.tokenize"):
        pairs = [texts(merging_tokenizer, "= 4", answer) for answer in ("8", "48")]
    assert pairs == [("=", " 48<eos>"), ("=", " 448<eos>")]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no prefix" in caplog.text


def test_prompt_that_melts_into_the_completion_is_refused(merging_tokenizer):
    with pytest.raises(ValueError, match=r"'4'.*'8'.*at least one token of its own.*end it on"):
        encode_prompt_completion(merging_tokenizer, "4", "8")


@pytest.mark.parametrize("completion", ["", "<|end|>", [], [{"role": "assistant", "content": ""}]])
def test_empty_completion_is_refused(tokenizer, completion):
    prompt = USER if isinstance(completion, list) else "48/2="
    with pytest.raises(ValueError, match=r"empty completion .* needs at least one token.*filter"):
        encode_prompt_completion(tokenizer, prompt, completion)


@pytest.mark.parametrize("prompt", ["", []])
def test_empty_prompt_is_refused(tokenizer, prompt):
    with pytest.raises(ValueError, match=r"empty prompt .* needs at least one token.*filter"):
        encode_prompt(tokenizer, prompt)


def test_messages_without_roles_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"prompt of type list.*'role' and 'content'.*convert"):
        encode_prompt(tokenizer, [{"text": "48/2="}])


def test_completion_of_several_turns_is_refused():
    with pytest.raises(ValueError, match=r"\['assistant', 'user'\].*one assistant message.*move"):
        completion_content([*ANSWER, *USER])


def test_missing_end_of_sequence_token_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(
        ValueError, match=r"no eos_token.*must end in one.*set tokenizer\.eos_token"
    ):
        encode_prompt_completion(tokenizer, "48/2=", "24")


def test_hugging_face_dataset_gains_an_index_that_survives_shuffling():
    numbered = with_index(Dataset.from_dict({"text": list("abcdefgh")})).shuffle(seed=1)
    assert sorted(zip(numbered["index"], numbered["text"], strict=True)) == list(
        enumerate("abcdefgh")
    )
    assert list(numbered["text"]) != list("abcdefgh")


def test_index_that_is_there_already_is_kept_or_refused():
    counted = with_index(Dataset.from_dict({"text": ["a", "b"]}))
    assert with_index(counted) is counted
    with pytest.raises(ValueError, match=r"column 'index' already, which starts \[5, 5\].*rename"):
        with_index(Dataset.from_dict({"index": [5, 5]}))


def test_any_map_style_dataset_is_wrapped():
    pairs = with_index(torch.utils.data.TensorDataset(torch.arange(3), torch.arange(3)))
    assert [int(entry) for entry in pairs[-1]] == [2, 2, 2]
    assert len(pairs) == 3
    assert list(IndexedDataset(["a", "b"])) == [("a", 0), ("b", 1)]


def test_dataset_without_random_access_is_refused():
    with pytest.raises(TypeError, match=r"got a generator.*same in every epoch.*map-style"):
        with_index(text for text in "ab")


@pytest.mark.parametrize("module", ["with_index", "tokenize"])
def test_light_modules_import_neither_datasets_nor_transformers(module):
    heavy = "{'datasets', 'transformers'} & set(sys.modules)"
    code = f"import sys, llm_xrisk.data.{module}; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tokenizer_fingerprint_sees_the_template_and_not_the_padding(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template += " "
    assert tokenizer_fingerprint(tokenizer) != before


def test_model_fingerprint_tells_policies_apart_and_nothing_else():
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path())
    before = model_fingerprint(model)
    model.config.use_cache = False
    assert model_fingerprint(model) == before
    assert model_fingerprint(model.to(torch.bfloat16)) == before
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert model_fingerprint(adapted) == before
    with torch.no_grad():
        adapted.get_base_model().model.norm.weight.add_(0.1)
    assert model_fingerprint(adapted) != before


def test_one_small_training_step_changes_the_fingerprint():
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path())
    before = model_fingerprint(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.arange(10, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert model_fingerprint(model) != before


def test_partitioned_parameter_cannot_be_fingerprinted():
    model = torch.nn.Linear(2, 2)
    model.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"weight is empty here.*whole weights.*gather="):
        model_fingerprint(model)
