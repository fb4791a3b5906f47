"""Discriminative constrained optimization as a trainer: rollouts, verifiers, updates."""

import json
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llm_xrisk.data.collators import pad_rows
from llm_xrisk.data.tokenize import encode_prompt
from llm_xrisk.fcco import join
from llm_xrisk.models import TokenLogProbs
from llm_xrisk.objectives import OBJECTIVES, SequenceObjective
from llm_xrisk.rollout.buffer import RolloutBuffer
from llm_xrisk.rollout.engine import RolloutEngine, make_engine
from llm_xrisk.rollout.scoring import evaluation_mode
from llm_xrisk.trainers.callbacks import inert_weights
from llm_xrisk.trainers.checkpoint import save_tensors
from llm_xrisk.trainers.config import DisCOConfig, RolloutConfig, require_config
from llm_xrisk.trainers.loading import disable_dropout, load_model, load_tokenizer
from llm_xrisk.trainers.mixin import Batch, ScoreWeighBackprop
from llm_xrisk.trainers.questions import Grader, QuestionStream, RewardFunction

logger = logging.getLogger(__name__)


class DisCOTrainer(ScoreWeighBackprop, Trainer):
    r"""Reinforces a language model by DisCO (6.83)-(6.85): rollouts, a verifier, a trust region.

    Each rollout asks ``per_device_train_batch_size`` x ``gradient_accumulation_steps`` x processes
    x ``updates_per_rollout`` / ``num_generations`` questions, draws ``num_generations`` answers to
    each, grades them, and takes ``updates_per_rollout`` optimizer steps, each on whole questions.
    Old log-probs are the trainer's own: an engine's differ by more than delta.

    Args:
        model: Name, model or PEFT model.
        args: Settings; a :class:`DisCOConfig`.
        reward_funcs: One or several functions with TRL's signature,
            ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``.
        train_dataset: Rows with ``prompt`` (text or messages) and the columns that the reward
            functions ask for.
        eval_dataset: The same, for :meth:`evaluate`.
        processing_class: Tokenizer; the model's own by default.
        peft_config: Adapter to put on the model.
        rollout: How completions are generated.
        reward_weights: One per function.
        engine: A rollout engine; built from ``rollout`` by default.
        **kwargs: For ``transformers.Trainer``.

    Raises:
        ValueError: batch sizes that split a question's answers over two steps, columns that a
            reward function asks for and the data set lacks, prompts that are too long, rewards
            that are not binary.

    Example:
        A complete run is ``recipes/disco.py``; in short::

            args = DisCOConfig(output_dir="out", score="likelihood_ratio", tau=1.0)
            trainer = DisCOTrainer(
                model, args, reward_funcs=arithmetic_reward, train_dataset=questions
            )
            trainer.train()

    Metrics: objective, discriminative, kl/k3 (with kl/standard_error), kl/k1, kl/multiplier,
    kl/violated, groups/valid_fraction, negatives/effective_fraction, reward, entropy,
    completions/mean_length, completions/clipped_ratio, sampling/log_prob_difference (engine
    against trainer).
    """

    _tag_names = ("llm-xrisk", "disco")
    _method = "reinforcement learning with verifiable rewards, objective {objective}"
    _source = "DisCO: Li et al., NeurIPS 2025"
    args: DisCOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any

    def __init__(
        self,
        model: str | nn.Module,
        args: DisCOConfig | None = None,
        *,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        rollout: RolloutConfig | None = None,
        reward_weights: Sequence[float] | None = None,
        engine: RolloutEngine | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or DisCOConfig(output_dir="disco-output")
        require_config(args, DisCOConfig)
        self.rollout = rollout or RolloutConfig()
        objective = build_objective(args, self.rollout.max_new_tokens)  # before a large model
        policy = load_model(model, args.model_init_kwargs, peft_config)
        tokenizer = load_tokenizer(processing_class, policy)
        if args.disable_dropout:
            disable_dropout(policy)
        super().__init__(
            model=policy,
            args=args,
            data_collator=_identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **kwargs,
        )
        self.setup_objective(objective)
        self.temperature = self.rollout.temperature
        several = isinstance(reward_funcs, list | tuple)
        functions: Any = list(reward_funcs) if several else [reward_funcs]
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        self.grade = Grader(functions, reward_weights, args.reward_threshold, decode)
        parts = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        for dataset in (train_dataset, *parts):
            if dataset is not None:
                self.grade.check(dataset)
        self._check_layout()
        self._engine, self._buffer = engine, RolloutBuffer()
        self._stream = QuestionStream(len(train_dataset or [0]), args.data_seed or args.seed)
        self._encoded: dict[int, list[int]] = {}
        # L1 asks for uniform weights, and a single wrong answer has all of it
        if args.objective == "DisCO" and args.tau and self.rollout.num_generations > 2:
            self.add_callback(inert_weights(0.99))

    def _check_layout(self) -> None:
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        if rows % self.rollout.num_generations:
            raise ValueError(
                f"per_device_train_batch_size x gradient_accumulation_steps = {rows} completions "
                f"per step and process is not a multiple of num_generations="
                f"{self.rollout.num_generations}; a step takes whole questions: change one of them"
            )
        self._questions_per_step = rows // self.rollout.num_generations
        if self.rollout.updates_per_rollout == 1 and getattr(self.objective, "kl_penalty", 0):
            logger.warning(
                "updates_per_rollout=1: every step starts at the policy that generated the "
                "answers, KL is 0 and the trust region never acts; use 2 or more (4 by default)"
            )

    # -- the data loader counts rows; the rows come from rollouts --------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """A loader of placeholders that counts completions, so epochs and resuming work."""
        updates, world = self.rollout.updates_per_rollout, self.args.world_size
        questions = self._questions_per_step * world * updates
        rollouts = max(1, math.ceil(len(self.train_dataset) / questions))
        rows: Any = range(rollouts * questions * self.rollout.num_generations)
        size = self.args.per_device_train_batch_size
        return self.accelerator.prepare(DataLoader(rows, batch_size=size, collate_fn=_identity))

    def mini_batch(self, batches: list[Any]) -> list[Batch]:
        """The rows of the next optimizer step, from a new rollout where none are left."""
        if len(self._buffer) == 0:
            self._buffer = self._roll_out()
        size = self.args.per_device_train_batch_size
        step = self._buffer.steps
        taken = self._buffer.take(size * len(batches))
        made = [self._prepare_inputs(self._collate(taken.take(size))) for _ in batches]
        if step == 0 and len(made) == 1:  # the policy has not moved: old is what it is now
            made[0]["engine_log_probs"] = made[0].pop("old_log_probs")
        elif step == 0:  # nor have the scores, which are known from the pass after the rollout
            for batch in made:
                old, mask = batch["old_log_probs"], batch["completion_mask"][:, -batch["keep"] :]
                batch["row_scores"] = self.objective.row_scores(old, mask, old, batch["targets"])
        return made

    def row_scores(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Scores of the rows; those of a policy that has not moved are their own old ones."""
        if "engine_log_probs" not in batch:
            return super().row_scores(model, batch)
        tokens = self.token_log_probs(model, batch, with_entropy=True)
        self._record_tokens([tokens], batch["engine_log_probs"][tokens.mask])
        current = tokens.log_probs
        return self.objective.row_scores(current, tokens.mask, current.detach(), batch["targets"])

    def _collate(self, rows: RolloutBuffer) -> Batch:
        batch = pad_rows(
            rows.prompt_ids,
            rows.completion_ids,
            pad_token_id=self.processing_class.pad_token_id,
            side=self.args.padding_side,
        )
        mask = batch["completion_mask"]
        old = torch.zeros(mask.shape, dtype=torch.float32)
        old[mask] = torch.tensor([value for row in rows.old_log_probs for value in row])
        batch["old_log_probs"] = old[:, -batch["keep"] :]
        batch["targets"] = torch.tensor(rows.targets, dtype=torch.float32)
        batch["group"] = torch.tensor(rows.group)
        batch["length"] = mask.sum(-1).to(torch.float32)
        return batch

    # -- rollouts --------------------------------------------------------------------------------

    @property
    def engine(self) -> RolloutEngine:
        """The rollout engine, built when it is first asked for."""
        if self._engine is None:
            config, options = self.rollout, json.loads(self.rollout.vllm_kwargs or "{}")
            if config.rollout == "transformers":
                collective = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
                options = {"batch_size": config.generation_batch_size, "synced_gpus": collective}
            self._engine = make_engine(
                config.rollout, self.model_wrapped, self.processing_class, **options
            )
        return self._engine

    def _roll_out(self) -> RolloutBuffer:
        updates, world, rank = (
            self.rollout.updates_per_rollout,
            self.args.world_size,
            self.args.process_index,
        )
        self.engine.sync(self.model_wrapped, version=self.state.global_step)
        per = self._questions_per_step
        start = self._stream.position
        drawn = self._stream.draw(updates * world * per)
        # step k, process r takes the r-th share of the k-th part: the same steps on any world
        mine = [(k * world + rank) * per + j for k in range(updates) for j in range(per)]
        rows = self._generate([drawn[m] for m in mine], [start + m for m in mine])
        if self.rollout.refill_tokens:
            rows = self._refill(rows, len(mine))
        self._score_old(rows)
        return rows

    def _generate(self, questions: list[int], groups: list[int]) -> RolloutBuffer:
        """Answers to the given data set rows, graded."""
        data, count = self.train_dataset, self.rollout.num_generations
        rows: list[Any] = [data[q] for q in questions]
        batch = self.engine.generate(
            [self._encode(q, row) for q, row in zip(questions, rows, strict=True)],
            self.rollout.sampling(self.args.seed),
            sample_ids=groups,  # a question that is asked again gets other answers
            num_generations=count,
        )
        repeated = [row for row in rows for _ in range(count)]
        grades = self.grade(repeated, batch.completion_ids, batch.finish_reasons, self.state)
        known = torch.tensor(grades.targets)
        lengths = torch.tensor([float(len(ids)) for ids in batch.completion_ids])
        clipped = torch.tensor([float(r == "length") for r in batch.finish_reasons])
        self._record_means(
            {
                "reward": known,
                "completions/mean_length": lengths,
                "completions/clipped_ratio": clipped,
                "rewards/ungradable": known.isnan().float(),
            }
        )
        self.record({f"rewards/{n}/mean": torch.tensor(v) for n, v in grades.rewards.items()})
        self.record({name: torch.tensor(value) for name, value in grades.metrics.items()})
        return RolloutBuffer(
            prompt_ids=batch.prompt_ids,
            completion_ids=batch.completion_ids,
            old_log_probs=batch.log_probs,  # replaced by the trainer's own
            targets=grades.without_ungradable(count),
            group=[group for group in groups for _ in range(count)],
        )

    def _refill(self, rows: RolloutBuffer, wanted: int) -> RolloutBuffer:
        """Ask further questions in place of those without a signal, within the token budget."""
        count, spent = self.rollout.num_generations, 0
        while True:
            missing = wanted - rows.signal(count).count(True)
            budget_left = spent < self.rollout.refill_tokens
            # every process asks as many as the one that needs most: engines may be collective
            need = torch.tensor([missing if budget_left else 0], device=self.args.device)
            most = int(join(need)[0].max())
            if most == 0:
                break
            start = self._stream.position
            drawn = self._stream.draw(most * self.args.world_size)
            share = slice(self.args.process_index * most, (self.args.process_index + 1) * most)
            groups = list(range(start, start + len(drawn)))[share]
            more = self._generate(drawn[share], groups)
            spent += sum(map(len, more.completion_ids))
            rows = rows + more
        signal = rows.signal(count)
        order = sorted(range(len(signal)), key=lambda question: not signal[question])
        kept = [g * count + j for g in order[:wanted] for j in range(count)]
        self.record({"rollout/refill_tokens": torch.tensor(float(spent))})
        return rows.pick(kept)

    @torch.no_grad()
    def _score_old(self, rows: RolloutBuffer) -> None:
        """Replace the engine's log-probs by the trainer's, in the layout of the updates.

        Where a step is one micro-batch, the first step's own forward pass gives its old log-probs:
        those rows keep the engine's, which :meth:`row_scores` compares with.
        """
        size = self.args.per_device_train_batch_size
        first = size if self.args.gradient_accumulation_steps == 1 else 0
        parts: list[TokenLogProbs] = []
        with evaluation_mode(self.model_wrapped), self.compute_loss_context_manager():
            for start in range(first, len(rows), size):
                part = rows.pick(range(start, min(start + size, len(rows))))
                batch = self._prepare_inputs(self._collate(part))
                parts.append(self.token_log_probs(self.model_wrapped, batch, with_entropy=True))
        if not parts:
            return
        engine = torch.tensor([value for row in rows.old_log_probs[first:] for value in row])
        self._record_tokens(parts, engine)
        rows.old_log_probs[first:] = [
            row[mask].tolist()
            for part in parts
            for row, mask in zip(part.log_probs.cpu(), part.mask.cpu(), strict=True)
        ]

    def _record_tokens(self, parts: list[TokenLogProbs], engine: Tensor) -> None:
        """Record entropy, and how far the engine's log-probs are from the trainer's."""
        ours = torch.cat([part.log_probs.detach()[part.mask] for part in parts])
        entropy = [part.entropy[part.mask] for part in parts if part.entropy is not None]
        difference = (ours - engine.to(ours.device)).abs()
        self._record_means(
            {"entropy": torch.cat(entropy), "sampling/log_prob_difference": difference}
        )

    def _encode(self, question: int, row: Any) -> list[int]:
        if question not in self._encoded:
            ids = encode_prompt(self.processing_class, row["prompt"])
            if len(ids) > self.args.max_prompt_length:
                raise ValueError(
                    f"the prompt of question {question} has {len(ids)} tokens, max_prompt_length "
                    f"is {self.args.max_prompt_length}; raise it or leave long prompts out"
                )
            self._encoded[question] = ids
        return self._encoded[question]

    def _record_means(self, values: dict[str, Tensor]) -> None:
        """Record means over the rows of all processes, NaN left out."""
        for name, rows in values.items():
            joined = join(rows.to(self.args.device))[0]
            self.record({name: joined.nanmean()})

    # -- evaluation and checkpoints --------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean reward and length of ``num_generations`` answers to each evaluation question."""
        data: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        data = self.eval_dataset[data] if isinstance(data, str) else data
        if data is None:
            raise ValueError("got no eval_dataset; evaluate(dataset) needs questions to ask")
        if isinstance(data, dict):
            found = [
                self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, part in data.items()
            ]
            return {name: value for part in found for name, value in part.items()}
        world, rank = self.args.world_size, self.args.process_index
        share = -(-len(data) // world)
        # the last process may ask a question twice, so that all generate together
        rows: Any = [data[min(rank * share + k, len(data) - 1)] for k in range(share)]
        self.engine.sync(self.model_wrapped, version=self.state.global_step)
        batch = self.engine.generate(
            [encode_prompt(self.processing_class, row["prompt"]) for row in rows],
            self.rollout.sampling(self.args.seed),
            sample_ids=list(range(rank * share, rank * share + share)),
            num_generations=self.rollout.num_generations,
        )
        repeated = [row for row in rows for _ in range(self.rollout.num_generations)]
        grades = self.grade(repeated, batch.completion_ids, batch.finish_reasons, self.state)
        real = torch.tensor(batch.sample_ids) < len(data)
        values = {
            "reward": torch.tensor(grades.targets)[real],
            "mean_length": torch.tensor([float(len(c)) for c in batch.completion_ids])[real],
        }
        metrics = {
            f"{metric_key_prefix}_{name}": float(join(v.to(self.args.device))[0].nanmean())
            for name, v in values.items()
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _rollout_path(self, directory: str) -> Path:
        return Path(directory) / f"rollouts-{self.args.process_index}.safetensors"

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        facts = {"position": str(self._stream.position)} | self._layout()
        save_tensors(self._buffer.state(), self._rollout_path(output_dir), facts)

    def _layout(self) -> dict[str, str]:
        """What a waiting rollout was made for; other steps would split its questions."""
        return {
            "world_size": str(self.args.world_size),
            "num_generations": str(self.rollout.num_generations),
            "questions_per_step": str(self._questions_per_step),
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / "rollouts-0.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"{checkpoint} has no {path.name}: it is not a checkpoint of this trainer, or was "
                "saved with save_only_model; start a new run with it as the model"
            )
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
        self._stream.position = int(facts["position"])
        found = {name: facts.get(name, "") for name in self._layout()}
        if found == self._layout():
            self._buffer = RolloutBuffer.from_state(load_file(self._rollout_path(checkpoint)))
        else:
            logger.warning(
                "the checkpoint was written with %s, this run has %s: answers that waited for "
                "their update are dropped and new ones generated",
                found,
                self._layout(),
            )


def build_objective(args: DisCOConfig, max_length: int) -> SequenceObjective:
    """The objective a configuration names.

    Args:
        args: The configuration.
        max_length: Longest completion, which Dr. GRPO divides by.

    Raises:
        ValueError: an unknown name.
    """
    if args.objective == "DisCO":
        return OBJECTIVES["DisCO"](  # pyright: ignore[reportReturnType]
            args.score,  # pyright: ignore[reportCallIssue]
            args.tau or None,
            delta=args.delta,
            kl_penalty=args.kl_penalty,
            kl_estimator=args.kl_estimator,
            normalizer=args.normalizer,
        )
    if args.objective not in ("GRPO", "DrGRPO", "DAPO"):
        raise ValueError(f"objective must be DisCO, GRPO, DrGRPO or DAPO, got {args.objective!r}")
    settings = {"max_length": max_length} if args.objective == "DrGRPO" else {}
    return OBJECTIVES[args.objective](**settings)  # pyright: ignore[reportReturnType]


def _identity(rows: Any) -> Any:
    return rows
