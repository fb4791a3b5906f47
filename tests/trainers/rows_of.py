"""Small classifiers, encoders and their data, for the tests of trainers of rows."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from llm_xrisk.trainers import (
    ClassificationConfig,
    ClassificationTrainer,
    ContrastiveConfig,
    ContrastiveTrainer,
)
from tests.trainers.build import COMMON

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def classifier(
    dropout: float = 0.0, labels: int = 2, **changes: Any
) -> BertForSequenceClassification:
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(**TINY, **rates, num_labels=labels, **changes))


def encoder(dropout: float = 0.0) -> BertModel:
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertModel(BertConfig(**TINY, **rates), add_pooling_layer=False)


def clip() -> CLIPModel:
    torch.manual_seed(0)
    text = CLIPTextConfig(**TINY, eos_token_id=2, bos_token_id=1)
    image = {k: v for k, v in TINY.items() if k not in ("vocab_size", "max_position_embeddings")}
    vision = CLIPVisionConfig(**image, image_size=8, patch_size=4)
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    )


def sentences(count: int = 24, labels: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Token ids; a positive is one in which token 7 stands more than once."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(3, 40, (8,), generator=generator)
        ids[:2] = 7 if index % 3 == 0 else 9
        label: Any = int(index % 3 == 0)
        if labels is not None:
            label = [float((index + k) % 3 == 0) for k in range(labels)]
        rows.append({"input_ids": ids, "attention_mask": torch.ones(8).long(), "labels": label})
    return [row | {"index": index} for index, row in enumerate(rows)]


def views(count: int = 24) -> list[dict[str, Any]]:
    """Pairs of token ids of which half are the same."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        first = torch.randint(3, 40, (8,), generator=generator)
        second = first.clone()
        second[4:] = torch.randint(3, 40, (4,), generator=generator)
        rows.append({"first": first, "second": second, "index": index})
    return rows


def captions(count: int = 12) -> list[dict[str, Any]]:
    """Images and texts of a tiny CLIP."""
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.cat(
                [torch.randint(3, 40, (5,), generator=generator), torch.tensor([2])]
            ),
            "attention_mask": torch.ones(6).long(),
            "pixel_values": torch.randn(3, 8, 8, generator=generator),
            "index": index,
        }
        for index in range(count)
    ]


def classification_trainer(
    output: Path | str,
    *,
    model: Any = None,
    rows: Any = None,
    eval_dataset: Any = None,
    batch_sampler: Any = None,
    callbacks: Any = None,
    compute_metrics: Any = None,
    peft_config: Any = None,
    **changes: Any,
) -> ClassificationTrainer:
    """Eight rows a step in two micro-batches."""
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    args = ClassificationConfig(output_dir=str(output), **(COMMON | batches | changes))
    return ClassificationTrainer(
        model or classifier(),
        args,
        train_dataset=sentences() if rows is None else rows,
        eval_dataset=eval_dataset,
        batch_sampler=batch_sampler,
        callbacks=callbacks,
        compute_metrics=compute_metrics,
        peft_config=peft_config,
    )


def contrastive_trainer(
    output: Path | str,
    *,
    model: Any = None,
    rows: Any = None,
    eval_dataset: Any = None,
    callbacks: Any = None,
    data_collator: Any = None,
    **changes: Any,
) -> ContrastiveTrainer:
    """Eight pairs a step in two micro-batches."""
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    args = ContrastiveConfig(output_dir=str(output), **(COMMON | batches | changes))
    return ContrastiveTrainer(
        model or encoder(),
        args,
        train_dataset=views() if rows is None else rows,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        data_collator=data_collator,
    )
