"""Checkpoints of every trainer, loaded where this package is not: by transformers and by PEFT."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_xrisk.trainers.merge import merge
from tests.recipes.test_merge_recipe import causal, logits, save
from tests.trainers.build import dft_trainer, disco_trainer, tiny_model
from tests.trainers.test_drrho import trainer_of as drrho_trainer

TRAINERS: dict[str, Callable[..., Any]] = {
    "dft": dft_trainer,
    "disco": disco_trainer,
    "drrho": drrho_trainer,
}
WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["llm_xrisk"] = sys.modules["reward"] = None  # an import of either fails
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[1:]:
    kind = AutoPeftModelForCausalLM if "lora" in folder else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found[folder] = model(torch.arange(3, 40).view(1, -1)).logits.flatten().tolist()
    inputs = tokenizer("48/2=", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > 5
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("base") / "base-model")


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Folder to the logits of the model that a trainer saved there."""
    place, found = tmp_path_factory.mktemp("runs"), {}
    for name, build in TRAINERS.items():
        for mode in ("full", "lora"):
            torch.manual_seed(0)
            folder = place / f"{name}-{mode}"
            trainer = build(
                folder,
                model=str(base),
                peft_config=causal() if mode == "lora" else None,
                max_steps=2,
                save_strategy="steps",
                save_steps=2,
            )
            trainer.train()
            trainer.save_model()
            found[str(folder)] = logits(trainer.model)
            found[str(folder / "checkpoint-2")] = found[str(folder)]
            if mode == "lora":
                merge(folder, place / f"{name}-merged")
                found[str(place / f"{name}-merged")] = found[str(folder)]
    return found


def test_checkpoints_load_in_transformers_and_peft_without_this_package(
    runs: dict[str, torch.Tensor], base: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *runs]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    start = logits(AutoModelForCausalLM.from_pretrained(base))
    assert len(found) == 15
    for folder, wanted in runs.items():
        model = torch.tensor(found[folder]).view_as(wanted)
        torch.testing.assert_close(model, wanted, rtol=1e-4, atol=1e-4, msg=folder)
        assert not torch.allclose(model, start, rtol=1e-4, atol=1e-4), folder
