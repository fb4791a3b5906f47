"""Hand-over: a checkpoint becomes a plain folder that transformers and vLLM load by themselves."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_xrisk.models.tempnet import CONFIG_NAME as TEMPNET_CONFIG
from llm_xrisk.models.tempnet import TempNet, TempNetConfig
from llm_xrisk.rollout.weight_sync import make_probe
from llm_xrisk.trainers.card import hand_over_card

TOLERANCE = 1e-4  # of the largest logit; float32 sums in another order differ by about 1e-6
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MODEL_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """What a folder holds.

    Attributes:
        folder: The folder.
        kind: "adapter", "model", or "TempNet" where nothing else is there.
        base: Name or folder of the model that an adapter or a TempNet was trained on.
        sharded: Whether the weights are in DeepSpeed's shards alone.
        tempnet: Whether a TempNet is there.
    """

    folder: Path
    kind: str
    base: str | None
    sharded: bool
    tempnet: bool

    @property
    def model(self) -> str:
        """Where the config, and the weights that are not in the folder, come from."""
        return str(self.folder) if self.kind == "model" else str(self.base)


@dataclass(frozen=True)
class Merged:
    """What :func:`merge` did.

    Attributes:
        source: What it was given.
        dtype: Of the weights it wrote.
        parameters: How many numbers they are, tied ones once.
        difference: Largest difference of a logit, the model written against the source.
        merging: The same, in float32 before weights are rounded to ``dtype``.
        tolerance: What ``merging`` was held to.
    """

    source: Source
    dtype: str
    parameters: int
    difference: float
    merging: float
    tolerance: float


def merge(
    source: str | Path,
    output: str | Path,
    *,
    base_model: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    report: Callable[[str], object] = lambda line: None,
) -> Merged:
    """Write a model that needs neither PEFT nor DeepSpeed nor this package.

    An adapter is merged into its base, DeepSpeed's shards are put together, the TempNet of a
    checkpoint comes along, and with a TempNet alone its base model. Tokenizer, chat template,
    generation config and card stand beside the weights. The folder appears when it is complete
    and checked: logits of the merged model are those of the source within :data:`TOLERANCE` times
    the largest one, and what is read back is what was merged, bit for bit. Adapters are merged in
    float32, which takes 4 bytes a parameter of memory, and rounded once.

    Args:
        source: Folder of an adapter, a model, a ``checkpoint-N`` or a TempNet.
        output: Folder to write.
        base_model: In place of the base that the adapter or the TempNet names; the tokenizer is
            taken from it where ``source`` has none.
        dtype: "float32", "bfloat16" or "float16"; by default that of the base model.
        overwrite: Replace the model that is in ``output``.
        report: Called with a line as each step begins.

    Returns:
        What was done and how exact it is.

    Raises:
        FileNotFoundError: there is no such folder, no weights in it, or no base model.
        FileExistsError: ``output`` is not empty.
        ValueError: an adapter that cannot be merged, folders inside each other, another dtype.
        RuntimeError: the check failed; nothing is written.
    """
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"got dtype={dtype!r}, need one of {', '.join(_DTYPES)}")
    found, target = read_source(source, base_model), Path(output)
    _check_output(target, found, overwrite)
    report(f"reading {_described(found)}")
    model = _load(found)
    tokenizer = _tokenizer(found, base_model)
    _align(model, tokenizer)
    ids = _probe(model)
    expected = _logits(model, ids)
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    if found.kind == "adapter":
        report("merging")
        model = _merge_adapter(model)
    merging = float((_logits(model, ids) - expected).abs().max())
    if not merging <= limit:
        raise RuntimeError(
            f"the merged model's logits differ by {merging:.2g} from the adapter's, need at most "
            f"{limit:.2g}: this adapter cannot be merged into these weights; serve it beside its "
            "base (vllm serve BASE --enable-lora)"
        )
    if dtype is not None or found.kind == "adapter" or found.sharded:
        model.to(getattr(torch, dtype or _dtype_name(found.model)))
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        report(f"writing {target}")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _copy_tempnet(found, partial)
        (partial / "README.md").write_text(_card(found, target), encoding="utf-8")
        report("checking what was written")
        difference = _check_written(model, partial, ids, expected)
        _put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    parameters = sum(p.numel() for p in model.parameters())
    name = str(model.dtype).removeprefix("torch.")
    return Merged(found, name, parameters, difference, merging, limit)


def read_source(folder: str | Path, base_model: str | None = None) -> Source:
    """See what a folder holds.

    Args:
        folder: A folder.
        base_model: In place of the base that an adapter or a TempNet names.

    Raises:
        FileNotFoundError: no folder, no weights in it, or no base model.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"got {folder}, which is no folder; need that of an adapter, a model or a checkpoint, "
            "as trainer.save_model writes it"
        )
    tempnet = (path / TEMPNET_CONFIG).is_file()
    weights = any((path / name).is_file() for name in _MODEL_WEIGHTS)
    shards = (path / "latest").is_file()
    if _adapts(path):
        if not _has_adapter_weights(path):
            raise FileNotFoundError(
                f"{path} has {_ADAPTER_CONFIG} and no whole {_ADAPTER_WEIGHTS[0]}; need the "
                "adapter's weights: pass a folder that was saved to its end"
            )
        config = json.loads((path / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
        named = config.get("base_model_name_or_path")
        return Source(path, "adapter", _base(path, base_model or named), False, tempnet)
    if (path / "config.json").is_file() and (weights or shards):
        return Source(path, "model", None, not weights, tempnet)
    if tempnet:
        base = _base(path, base_model or TempNetConfig.from_pretrained(path).base_model)
        return Source(path, "TempNet", base, False, True)
    raise FileNotFoundError(_nothing_here(path))


def _has_adapter_weights(path: Path) -> bool:
    """Whether there are some: a process that holds a shard of them may have left an empty file."""
    file = path / _ADAPTER_WEIGHTS[0]
    if not file.is_file():
        return (path / _ADAPTER_WEIGHTS[1]).is_file()
    with safe_open(file, framework="pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return bool(shapes) and all(0 not in shape for shape in shapes)


def _base(path: Path, named: str | None) -> str:
    if not named:
        raise FileNotFoundError(
            f"{path} does not name the model it was trained on; need it: --base_model MODEL"
        )
    local = Path(named)
    if local.is_dir() and (local / "config.json").is_file():
        return named
    if local.is_absolute() or local.exists() or named.count("/") != 1 or named.startswith("."):
        raise FileNotFoundError(
            f"{path} was trained on {named}, which is no model here; need its base: run where that "
            "path exists, or pass --base_model MODEL"
        )
    return named  # a name of the hub


def _nothing_here(path: Path) -> str:
    inner = sorted(p.name for p in path.iterdir() if (p / "config.json").is_file() or _adapts(p))
    if inner:
        where = f"it holds {', '.join(inner)}: pass one of them, as in {path / inner[-1]}"
    elif any(path.glob("pytorch_model_fsdp*")):
        where = "it holds FSDP's shards: put them together with `accelerate merge-weights` first"
    else:
        where = "pass a folder that trainer.save_model wrote, or a checkpoint-N"
    return (
        f"got {path}, which has neither {_ADAPTER_CONFIG} nor a config.json with model.safetensors;"
        f" need weights: {where}"
    )


def _adapts(path: Path) -> bool:
    return (path / _ADAPTER_CONFIG).is_file()


def _check_output(target: Path, source: Source, overwrite: bool) -> None:
    inside, folders = target.resolve(), [source.folder.resolve()]
    if source.base is not None and Path(source.base).is_dir():
        folders.append(Path(source.base).resolve())
    for folder in folders:
        if inside == folder or folder in inside.parents or inside in folder.parents:
            raise ValueError(
                f"got output {target}, which is, holds or lies inside {folder}, a model to read; "
                "need a folder apart from it"
            )
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"got output {target}, which is a file; need a folder's name")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"got output {target}, which is not empty; need a new folder: pass another one, or "
            "--overwrite true to replace the model in it"
        )
    if not (target / "config.json").is_file():
        raise FileExistsError(
            f"got output {target}, which is not empty and holds no model; --overwrite replaces "
            "models alone: pass another folder"
        )


def _described(source: Source) -> str:
    what = f"the {source.kind} {source.folder}"
    if source.sharded:
        what += ", whose weights are in DeepSpeed's shards,"
    return what if source.base is None else f"{what} on {source.base}"


def _config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(
            f"got the base model {name}, which is neither a folder here nor a model of the hub "
            f"within reach ({str(error).splitlines()[0]}); need it: pass --base_model MODEL"
        ) from error


def _dtype_name(name: str) -> str:
    return str(_config(name).dtype or torch.float32).removeprefix("torch.")


def _load(source: Source) -> Any:
    """The model of a source, an adapter on its base, in eval mode."""
    config = _config(source.model)
    kind = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
    if source.sharded:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _fill(model, _shards(source.folder))
        return model.eval()
    if source.kind != "adapter":
        return kind.from_pretrained(source.model, dtype="auto").eval()
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"got an adapter on {source.base}, whose weights are quantised; need the unquantised "
            "model to merge into: pass it as --base_model"
        )
    return _with_adapter(source, kind.from_pretrained(source.model, dtype=torch.float32)).eval()


def _with_adapter(source: Source, model: Any) -> Any:
    from peft import PeftConfig, PeftModel

    folder = str(source.folder)
    config: Any = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning or config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"got an adapter of type {config.peft_type.value} for {config.task_type}; need one of "
            "a language model that changes weights, such as LoRA: serve others with PEFT"
        )
    if (source.folder / "tokenizer_config.json").is_file():
        tokens = len(AutoTokenizer.from_pretrained(folder))
        if tokens > model.get_input_embeddings().weight.shape[0]:  # tokens were added
            model.resize_token_embeddings(tokens)
    return PeftModel.from_pretrained(model, folder)


def _shards(folder: Path) -> dict[str, Tensor]:
    """Weights in float32 from the shards of DeepSpeed's stages 2 and 3."""
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ValueError(
            f"{folder} holds its weights in DeepSpeed's shards, and DeepSpeed is not installed; "
            "need it to put them together: pip install llm-xrisk[deepspeed]"
        ) from error
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        weights: Any = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        return weights


def _fill(model: Any, weights: dict[str, Tensor]) -> None:
    """Load all of a model's weights; those that are tied need to come once."""
    missing, unknown = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    missing = sorted(set(missing) & {name for name, _ in model.named_parameters()})
    if missing or unknown:
        raise ValueError(
            f"DeepSpeed's shards do not fit the model: {len(missing)} weights are missing "
            f"{missing[:3]}, {len(unknown)} are unknown {unknown[:3]}; need a checkpoint of this "
            "model with all of its weights"
        )


def _tokenizer(source: Source, base_model: str | None) -> Any:
    has_one = (source.folder / "tokenizer_config.json").is_file()
    name = str(source.folder) if has_one else base_model or source.model
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"found no tokenizer in {source.folder} nor in {name}; need one, for a server cannot "
            "do without: save it there, or pass a --base_model that has it"
        ) from error


def _align(model: Any, tokenizer: Any) -> None:
    """Let generation end at the tokenizer's end token, which training may have changed."""
    config = model.generation_config
    known = config.eos_token_id
    ends = known if isinstance(known, list) else [known] if known is not None else []
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        config.eos_token_id = [tokenizer.eos_token_id, *ends]


def _probe(model: Any) -> Tensor:
    probe = make_probe(model.get_input_embeddings().weight.shape[0], num_sequences=2, length=24)
    return torch.tensor([a + b for a, b in zip(probe.prompts, probe.completions, strict=True)])


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.float()


def _merge_adapter(model: Any) -> Any:
    """The base with the adapter in its weights; a head that shares them gets its own first."""
    inner = model.get_base_model()
    places = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    if inner.config.tie_word_embeddings and any(hasattr(m, "base_layer") for m in places):
        head: Any = getattr(places[1], "base_layer", places[1])
        head.weight = nn.Parameter(head.weight.detach().clone())
        inner.config.tie_word_embeddings = False
    return model.merge_and_unload()


def _copy_tempnet(source: Source, output: Path) -> None:
    if not source.tempnet:
        return
    vocab_size = AutoConfig.from_pretrained(output).get_text_config().vocab_size
    net = TempNet.from_pretrained(source.folder, vocab_size=vocab_size)
    net.config = replace(net.config, base_model=None)  # it lies beside it
    net.save_pretrained(output)


def _card(source: Source, target: Path) -> str:
    folders = [source.folder]
    if source.folder.name.startswith("checkpoint-"):  # has none, or PEFT's template
        folders.insert(0, source.folder.parent)
    cards = [folder / "README.md" for folder in folders if (folder / "README.md").is_file()]
    text = cards[0].read_text(encoding="utf-8") if cards else ""
    return hand_over_card(text, name=target.resolve().name, base=source.base, kind=source.kind)


def _check_written(model: Any, folder: Path, ids: Tensor, expected: Tensor) -> float:
    """Read it back as anyone would; the largest difference of a logit to those of the source."""
    written, info = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
    wanted, found = model.state_dict(), written.state_dict()
    wrong = [n for n in wanted if n not in found or not torch.equal(wanted[n], found[n])]
    wrong += sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} weights were not read back as they were merged ({wrong[:3]}); need a "
            "model that save_pretrained keeps whole: report this model's architecture"
        )
    return float((_logits(written.eval(), ids) - expected).abs().max())


def _put_in_place(partial: Path, target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):  # a model that may be replaced
        old = target.with_name(f"{target.name}.old")
        os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old)
        return
    if target.is_dir():
        target.rmdir()
    os.replace(partial, target)
