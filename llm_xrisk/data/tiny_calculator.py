"""The embedded model `tiny-calculator` before training: its tokenizer and its architecture."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PAD, EOS, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHARACTERS = "0123456789+-*/().,=%$\n " + string.ascii_letters + string.punctuation

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def char_tokenizer(model_max_length: int = 1024) -> PreTrainedTokenizerFast:
    """Tokenizer of 102 tokens: six special ones, then printable ASCII and the newline.

    Encoding adds nothing to the text, and decoding returns it unchanged. The chat template is
    `<|user|>48/2=<|end|><|assistant|>`, and likewise for a system message.

    Args:
        model_max_length: longest input in tokens that the model reads.

    Example:
        >>> tokenizer = char_tokenizer()
        >>> len(tokenizer), tokenizer.decode(tokenizer("48/2=")["input_ids"])
        (102, '48/2=')
    """
    tokens = dict.fromkeys((PAD, EOS, UNKNOWN, *ROLES, *CHARACTERS))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=list(ROLES),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def untrained_calculator(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Qwen3 model of 866,432 random parameters: 4 layers of 128, tied embeddings, float32.

    Args:
        tokenizer: gives the number of tokens, the end and padding ids and the longest input.

    Example:
        >>> untrained_calculator(char_tokenizer()).num_parameters()
        866432
    """
    vocabulary = tokenizer.get_vocab()
    end, pad = vocabulary[EOS], vocabulary[PAD]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        dtype="float32",
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    return model
