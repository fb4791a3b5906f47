"""What TempNetTrainer says of a network that does not do its work yet."""

from tests.trainers.build import pairs
from tests.trainers.test_tempnet_trainer import trainer_of


def test_one_temperature_for_all_tokens_is_told_and_several_are_not(tmp_path, caplog):
    trainer = trainer_of(tmp_path, eval_dataset=pairs())
    found = trainer.evaluate()
    assert found["eval_tau/max"] < 1.01 * found["eval_tau/min"]
    assert "every token the temperature" in caplog.text and "0.5" in caplog.text
    caplog.clear()
    with_spread = trainer.net.last.weight.data
    with_spread.normal_(std=30.0)
    found = trainer.evaluate()
    assert found["eval_tau/max"] > 1.01 * found["eval_tau/min"]
    assert "every token the temperature" not in caplog.text
