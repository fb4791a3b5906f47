"""What all trainers share: exact losses, honest averages, untouched dtypes, whole checkpoints."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer

from llm_xrisk.models import selective_log_softmax
from llm_xrisk.trainers.callbacks import WarnOnceCallback
from llm_xrisk.trainers.checkpoint import last_complete_checkpoint
from tests.trainers.build import (
    LORA,
    dft_config,
    dft_trainer,
    disco_trainer,
    logged,
    losses,
    pairs,
)


@pytest.fixture(scope="module")
def disco(tmp_path_factory):
    trainer = disco_trainer(tmp_path_factory.mktemp("disco"))
    trainer.train()
    return trainer


def test_the_logged_loss_is_the_objective_to_the_bit(disco, tmp_path):
    assert losses(disco) == pytest.approx(logged(disco, "objective"), rel=1e-6)
    dft = dft_trainer(tmp_path, max_steps=3)
    dft.train()
    assert losses(dft) == pytest.approx(logged(dft, "objective"), rel=1e-6)


def test_a_step_with_unequal_micro_batches_reports_the_objective_of_its_rows(tmp_path):
    """Five prompts as four and one: each prompt counts the same."""
    trainer = dft_trainer(tmp_path, rows=pairs(5), max_steps=3)
    trainer.train()
    whole = dft_trainer(
        tmp_path,
        rows=pairs(5),
        max_steps=3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
    )
    whole.train()
    for name in ("loss", "objective", "score/gold", "negatives/weight"):
        assert logged(trainer, name) == pytest.approx(logged(whole, name), rel=1e-5)


def test_averages_leave_out_what_was_not_measured(disco):
    disco.record({"some": torch.tensor(1.0), "none": torch.tensor(math.nan)}, "eval")
    disco.record({"some": torch.tensor(math.nan), "none": torch.tensor(math.nan)}, "eval")
    disco.record({"some": torch.tensor(3.0)}, "eval")
    assert disco._averages("eval") == {"some": 2.0}
    assert disco._averages("eval") == {}


def test_averages_weigh_as_told(disco):
    disco.record({"x": torch.tensor(1.0)}, "eval", torch.tensor(0.75))
    disco.record({"x": torch.tensor(5.0)}, "eval", torch.tensor(0.25))
    assert disco._averages("eval") == {"x": 2.0}


def test_deepspeed_in_bfloat16_leaves_the_numbers_of_a_batch_alone(disco, monkeypatch):
    """``Trainer`` casts every float to the model's dtype: old log-probs, lengths, coefficients."""
    config = SimpleNamespace(dtype=lambda: torch.bfloat16)
    plugin = SimpleNamespace(hf_ds_config=config)
    monkeypatch.setattr(disco, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(disco.accelerator.state), "deepspeed_plugin", plugin)
    batch = {"length": torch.tensor([257.0]), "coefficients": {"kl": torch.tensor([1 / 3])}}
    rounded = Trainer._prepare_input(disco, batch["length"])
    assert rounded.item() == 256  # what would happen
    prepared = disco._prepare_inputs(batch)
    assert prepared["length"].item() == 257
    assert prepared["coefficients"]["kl"].dtype == torch.float32


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = dft_config(tmp_path)
    args._n_gpu = 2
    trainer = dft_trainer(tmp_path)
    trainer.args = args
    with pytest.raises(ValueError) as caught:
        trainer.setup_objective(trainer.objective)
    assert "2 GPUs in one process" in str(caught.value)
    assert "one process for each" in str(caught.value)
    assert "accelerate launch" in str(caught.value)


def checkpoint(folder, number, state="{}"):
    path = folder / f"checkpoint-{number}"
    path.mkdir()
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return str(path)


def test_the_last_checkpoint_is_the_last_one_written_to_its_end(tmp_path):
    checkpoint(tmp_path, 2)
    whole = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, state='{"epoch": 1.')  # killed while writing the state
    checkpoint(tmp_path, 12, state=None)  # killed before
    checkpoint(tmp_path, "best")
    assert last_complete_checkpoint(str(tmp_path)) == whole


def test_no_checkpoint_at_all_is_said(tmp_path):
    checkpoint(tmp_path, 2, state=None)
    with pytest.raises(ValueError) as caught:
        last_complete_checkpoint(str(tmp_path))
    assert f"no complete checkpoint in {tmp_path}" in str(caught.value)
    assert "leave resume_from_checkpoint out" in str(caught.value)


def test_a_checkpoint_written_over_an_old_one_is_incomplete_until_its_end(tmp_path, monkeypatch):
    trainer = dft_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")
    # the disk runs full in the middle of writing the same checkpoint again
    monkeypatch.setattr(trainer, "_save_scaler", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer._save_checkpoint(trainer.model, trial=None)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        last_complete_checkpoint(str(tmp_path))


def test_the_state_of_the_trainer_is_written_last(tmp_path):
    trainer = dft_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert max(times, key=times.__getitem__) == "trainer_state.json"
    assert {"objective.safetensors", "optimizer.pt", "model.safetensors"} <= set(times)
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 1


def test_warnings_come_once_after_so_many_lines_in_a_row(caplog):
    callback = WarnOnceCallback("x", 0.5, "x is {:.1f}: too much", patience=3)
    for value in (0.9, 0.9, 0.1, 0.9, None, 0.9, 0.8, 0.9, 0.9, 0.9, 0.9):
        callback.on_log(None, None, None, logs={} if value is None else {"x": value})
    assert [record.message for record in caplog.records] == ["x is 0.8: too much"]


@pytest.mark.parametrize("adapter", [None, LORA])
def test_logits_stay_narrow_under_mixed_precision(tmp_path, monkeypatch, adapter):
    seen = []

    def recorded(logits, *args, **kwargs):
        seen.append((torch.is_grad_enabled(), logits.dtype))
        return selective_log_softmax(logits, *args, **kwargs)

    monkeypatch.setattr("llm_xrisk.models.logprobs.selective_log_softmax", recorded)
    config = LoraConfig(**adapter) if adapter else None
    trainer = dft_trainer(tmp_path, bf16=True, max_steps=1, peft_config=config)
    trainer.train()
    assert {dtype for graph, dtype in seen if graph} == {torch.bfloat16}
    assert trainer.objective.inner.u.dtype == torch.float32


def test_a_lone_process_of_several_is_refused(tmp_path, monkeypatch):
    trainer = disco_trainer(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2 .* pass --use_cpu true"):
        trainer.setup_objective(trainer.objective)
