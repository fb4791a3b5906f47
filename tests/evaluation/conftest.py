"""Small evaluations with numbers a reader can redo."""

from llm_xrisk.evaluation.pass_at_k import CompletionSample, Evaluation


def make_run(
    name: str,
    correct: list[int],
    *,
    greedy: list[int] | None = None,
    num_generations: int = 4,
    sample_ids: list[int] | None = None,
    ks: list[int] | None = None,
    samples: list[CompletionSample] | None = None,
) -> Evaluation:
    count = len(correct)
    return Evaluation(
        name=name,
        sample_ids=sample_ids or list(range(10, 10 + count)),
        num_generations=num_generations,
        correct=correct,
        mean_lengths=[2.0 + number for number in range(count)],
        truncated=[0] * (count - 1) + [1],
        greedy_correct=greedy,
        ks=ks or [1, 2],
        sampling={"temperature": 1.0, "top_p": 0.9, "top_k": 0, "max_new_tokens": 8},
        samples=samples or [],
    )


def make_sample(
    sample_id: int, text: str, *, correct: bool, greedy: bool = True, prompt: str = "48/2="
) -> CompletionSample:
    return CompletionSample(sample_id, prompt, "24", text, correct, greedy, False, len(text) + 1)
