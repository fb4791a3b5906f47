"""The main job for one seed: every stage, from the base's evaluation to that of the last policy."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from llm_xrisk.data.fingerprint import model_fingerprint
from llm_xrisk.data.gsm8k_steps import load_steps, tiny_model_path
from llm_xrisk.data.pool import load_pool
from llm_xrisk.evaluation.discrimination import auc_per_prompt
from llm_xrisk.evaluation.pass_at_k import Evaluation, evaluate
from llm_xrisk.quickstart.config import QuickstartConfig
from llm_xrisk.quickstart.stages import Stages
from llm_xrisk.rollout.engine import SamplingConfig
from llm_xrisk.rollout.negatives import build_pool
from llm_xrisk.rollout.transformers_engine import TransformersEngine
from llm_xrisk.trainers import DFTConfig, DFTTrainer, DisCOConfig, DisCOTrainer, RolloutConfig
from llm_xrisk.trainers.checkpoint import last_complete_checkpoint
from reward import arithmetic_reward

Advance = Callable[[float], None]
_GENERATION_BATCH = 512


@dataclass
class SeedResult:
    """What one seed gave.

    Attributes:
        evaluations: By row of the table.
        auc: Mean per-prompt AUC of gold answers against the base's samples, held out, by row.
        histories: The trainers' log histories, by row.
        seconds: Wall time by stage.
    """

    evaluations: dict[str, Evaluation] = field(default_factory=dict[str, Evaluation])
    auc: dict[str, float] = field(default_factory=dict[str, float])
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, Any])
    seconds: dict[str, float] = field(default_factory=dict[str, float])


class MainJob:
    """The stages of the main job.

    Args:
        config: Settings.
        seed: This job's seed.
        stages: Where stages run.
    """

    def __init__(self, config: QuickstartConfig, seed: int, stages: Stages) -> None:
        self.config, self.seed, self.stages = config, seed, stages
        self.base = config.model_name_or_path or tiny_model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        seen = {row["prompt"] for row in load_steps("train")}
        held_out = [row for row in load_steps("test") if row["prompt"] not in seen]
        spread = len(held_out) / config.eval_questions
        picked = [
            held_out[int(k * spread)] for k in range(min(config.eval_questions, len(held_out)))
        ]
        self.eval_rows = [_question(k, row) for k, row in enumerate(picked)]
        self.train_rows = [_question(k, row) for k, row in enumerate(load_steps("train"))]
        stages.keys["base"] = model_fingerprint(self._load(Path(self.base)))

    def run(self) -> SeedResult:
        """Do what is not done yet and collect the results."""
        config, result = self.config, SeedResult()
        self._evaluate(result, "base", Path(self.base), "base")
        if config.controls:
            self._evaluate(result, "base, T = 0.5", Path(self.base), "base", temperature=0.5)
        pool = self._pool("pool", self.train_rows[: config.pool_questions], config.num_negatives)
        held_out = self._pool("pool-held-out", self.eval_rows, 8)
        self._auc(result, "base", Path(self.base), "base", held_out)
        dft = self._dft(result, "DFT", pool, num_negatives=config.num_negatives)
        self._auc(result, "DFT", dft, "dft", held_out)
        self._disco(result, "DisCO", Path(self.base), "base")
        self._disco(result, "DFT then DisCO", dft, "dft")
        if config.controls:
            sft = self._dft(result, "SFT", pool, num_negatives=0)
            self._auc(result, "SFT", sft, "sft", held_out)
            self._disco(result, "GRPO", Path(self.base), "base", objective="GRPO")
        result.seconds = dict(self.stages.seconds)
        return result

    # -- stages ------------------------------------------------------------------------------------

    def _evaluate(
        self, result: SeedResult, row: str, model: Path, source: str, temperature: float = 1.0
    ) -> None:
        config, name = self.config, f"eval-{_slug(row)}"
        settings = {
            "questions": config.eval_questions,
            "samples": config.eval_samples,
            "tokens": config.max_new_tokens,
            "temperature": temperature,
            "seed": self.seed,
        }

        def work(directory: Path, advance: Advance) -> None:
            sampling = SamplingConfig(config.max_new_tokens, temperature, seed=1_000 + self.seed)
            evaluate(
                self._engine(model),
                self.eval_rows,
                self.tokenizer,
                arithmetic_reward,
                sampling=sampling,
                num_generations=config.eval_samples,
                name=row,
                on_progress=advance,
            ).save(directory / "evaluation.json")

        total = len(self.eval_rows) * (config.eval_samples + 1)
        path = self.stages.run(
            name, f"evaluate {row}", work, total=total, settings=settings, inputs=(source,)
        )
        result.evaluations[row] = Evaluation.load(path / "evaluation.json")

    def _pool(self, name: str, rows: list[dict[str, Any]], num_negatives: int) -> Path:
        config = self.config
        settings = {"rows": len(rows), "m": num_negatives, "drawn": 2, "seed": self.seed}

        def work(directory: Path, advance: Advance) -> None:
            build_pool(
                self._engine(Path(self.base)),
                self.tokenizer,
                rows,
                directory / "pool",
                sampling=SamplingConfig(config.max_new_tokens, 1.0, seed=self.seed),
                num_negatives=num_negatives,
                num_generations=2 * num_negatives,
                verify=arithmetic_reward,
                on_progress=advance,
            )

        title = "sample negatives" + (" (held out)" if "held" in name else "")
        return self.stages.run(
            name, title, work, total=len(rows), settings=settings, inputs=("base",)
        )

    def _dft(self, result: SeedResult, row: str, pool: Path, *, num_negatives: int) -> Path:
        config, name = self.config, _slug(row)
        settings = {
            "steps": config.dft_steps,
            "batch": config.dft_batch,
            "lr": config.dft_learning_rate,
            "m": num_negatives,
            "seed": self.seed,
        }

        def work(directory: Path, advance: Advance) -> None:
            args = DFTConfig(
                num_negatives=num_negatives,
                per_device_train_batch_size=config.dft_batch,
                max_steps=config.dft_steps,
                learning_rate=config.dft_learning_rate,
                **self._arguments(directory),
            )
            data = load_pool(pool / "pool", tokenizer=self.tokenizer).to_dataset(with_empty=True)
            trainer = DFTTrainer(
                self._load(Path(self.base)),
                args,
                train_dataset=data,
                processing_class=self.tokenizer,
            )
            self._train(trainer, directory, advance)

        path = self.stages.run(
            name,
            f"train {row}",
            work,
            total=config.dft_steps,
            settings=settings,
            inputs=("base", "pool"),
        )
        return self._trained(result, row, path, name)

    def _disco(
        self, result: SeedResult, row: str, start: Path, source: str, objective: str = "DisCO"
    ) -> Path:
        config, name = self.config, _slug(row)
        rollout = RolloutConfig(
            max_new_tokens=config.max_new_tokens,
            temperature=1.0,
            num_generations=config.num_generations,
            updates_per_rollout=config.updates_per_rollout,
            generation_batch_size=_GENERATION_BATCH,
        )
        method: dict[str, Any] = {
            "objective": objective,
            "max_steps": config.disco_steps,
            "learning_rate": config.disco_learning_rate,
            "per_device_train_batch_size": config.disco_questions * config.num_generations,
        }
        if objective == "DisCO":
            method |= {"score": config.score, "tau": config.tau, "delta": config.delta}

        def work(directory: Path, advance: Advance) -> None:
            trainer = DisCOTrainer(
                self._load(start),
                DisCOConfig(**method, **self._arguments(directory)),
                reward_funcs=arithmetic_reward,
                train_dataset=self.train_rows,
                processing_class=self.tokenizer,
                rollout=rollout,
            )
            self._train(trainer, directory, advance)

        path = self.stages.run(
            name,
            f"train {row}",
            work,
            total=config.disco_steps,
            settings=method | {"rollout": repr(rollout), "seed": self.seed},
            inputs=(source,),
        )
        return self._trained(result, row, path, name)

    def _auc(self, result: SeedResult, row: str, model: Path, source: str, pool: Path) -> None:
        def work(directory: Path, advance: Advance) -> None:
            rows = list(load_pool(pool / "pool").to_dataset())
            pad = self.tokenizer.pad_token_id
            values = auc_per_prompt(self._load(model), rows, pad_token_id=pad)
            (directory / "auc.json").write_text(json.dumps(values))

        path = self.stages.run(
            f"auc-{_slug(row)}",
            f"AUC of {row}",
            work,
            total=1,
            settings={},
            inputs=(source, "pool-held-out"),
        )
        values = json.loads((path / "auc.json").read_text())
        result.auc[row] = sum(values) / len(values)

    # -- pieces ------------------------------------------------------------------------------------

    def _trained(self, result: SeedResult, row: str, path: Path, name: str) -> Path:
        result.histories[row] = json.loads((path / "log.json").read_text())
        self._evaluate(result, row, path / "model", name)
        return path / "model"

    def _train(self, trainer: Any, directory: Path, advance: Advance) -> None:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Advance(advance))
        try:
            resume: str | None = last_complete_checkpoint(trainer.args.output_dir)
        except ValueError:
            resume = None
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(directory / "model"))
        (directory / "log.json").write_text(json.dumps(trainer.state.log_history))

    def _arguments(self, directory: Path) -> dict[str, Any]:
        return {
            "output_dir": str(directory / "checkpoints"),
            "seed": self.seed,
            "logging_steps": 2,
            "save_steps": 20,
            "save_total_limit": 1,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "report_to": [],
        }

    def _load(self, path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path)

    def _engine(self, path: Path) -> TransformersEngine:
        return TransformersEngine(self._load(path), self.tokenizer, batch_size=_GENERATION_BATCH)


class _Advance(TrainerCallback):
    """Moves a stage's bar with every optimizer step."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)


def _question(index: int, row: Any) -> dict[str, Any]:
    return {
        "index": index,
        "id": index,
        "prompt": row["prompt"],
        "completion": row["answer"],
        "answer": row["answer"],
    }


def _slug(row: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in row.lower()).strip("-")
