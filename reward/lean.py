# SPDX-License-Identifier: Apache-2.0
"""Proofs in Lean 4, checked by `lake env lean` where there is a toolchain.

Without `lake`, or with one that does not work, every verdict is "unavailable" with score None.

Elaborating Lean runs code. Refused words and a private file keep an honest policy honest; they are
no sandbox, so check proofs of an untrusted model where nothing can be lost.
"""

import os
import re
import selectors
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import monotonic, perf_counter

from reward.base import LogExtra, LogMetric, completion_text, log_verdicts
from reward.types import Status, Verdict

MAX_OUTPUT = 64 * 1024
ALLOWED_AXIOMS = {"propext", "Classical.choice", "Quot.sound"}
KEPT_VARIABLES = ("PATH", "HOME", "ELAN_HOME", "ELAN_TOOLCHAIN", "LANG", "LC_ALL", "TMPDIR")
# They leave a proof open, bring in axioms, or run code while Lean reads the file.
REFUSED = {
    *("sorry", "admit", "axiom", "axioms", "native_decide", "implemented_by", "extern", "csimp"),
    *("#eval", "#exit", "#print", "run_cmd", "run_tac", "run_elab", "elab", "macro", "unsafe"),
    *("initialize", "builtin_initialize", "by_elab", "IO", "logInfo", "dbg_trace", "set_option"),
    *("syntax", "import", "namespace"),
}

_BLOCK = re.compile(r"^```lean4?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_WORD = re.compile(r"#?\w+")
_OPEN_END = re.compile(r":=(?:\s*by)?(?:\s+sorry)?\s*\Z")
_NAME = re.compile(r"\b(?:theorem|lemma)\s+([\w.']+)")
_AXIOMS = re.compile(r"'([^'\n]+)' depends on axioms: \[([^\]\n]*)\]")


@dataclass(frozen=True)
class LeanVerifier:
    """Grades a proof: the gold is a theorem without one, the completion proves it.

    The gold ends in `:=`, `:= by` or `:= by sorry`. Of a completion the last ```` ```lean ````
    block counts. If it states the theorem, what follows is the proof, and what stands before is
    dropped, so that no definition or notation can change what the theorem says; otherwise the
    whole block is the proof. The theorem is the gold's, always.

    A proof is right if Lean accepts the file and the theorem rests on Lean's three axioms only. A
    proof with one of the words `REFUSED` is wrong, wherever the word stands.

    Args:
        project: Directory of a Lake project, the working directory of the check.
        header: What stands above the theorem, such as `import Mathlib`.
        timeout: Wall seconds for one proof, after which Lean and what it started are killed.
        max_characters: A longer proof is not checked: status "too_long".
        lake: Name or path of the program.

    Raises:
        ValueError: If the timeout is not positive.

    Example:
        >>> LeanVerifier(lake="no-such-program").verify("theorem t : True := by", "trivial").status
        'unavailable'
    """

    project: str = "."
    header: str = ""
    timeout: float = 60.0
    max_characters: int = 20_000
    lake: str = "lake"

    def __post_init__(self) -> None:
        """Refuse a check that could not end."""
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout}")

    def verify(self, gold: object, completion: str, *, truncated: bool = False) -> Verdict:
        """Check one proof.

        Args:
            gold: The statement, up to its proof.
            completion: The text with the proof.
            truncated: Whether the completion was cut at the length limit; it then scores 0.0.

        Returns:
            The verdict; `None` as score only without a toolchain, or for a gold that is no theorem.
        """
        start = perf_counter()
        proof = None
        statement = self._statement(gold)
        missing = "" if statement is None else self.unavailable()
        if statement is None:
            ending = None, "gold_unparsable", "gold is no theorem that ends in := or := by"
        elif missing:
            ending = None, "unavailable", missing
        elif truncated:
            ending = 0.0, "truncated", "cut at the length limit"
        else:
            proof = self._proof(statement, completion)
            ending = self._check(statement, proof)
        score, status, detail = ending
        return Verdict(score, status, proof, detail, perf_counter() - start)

    def unavailable(self) -> str:
        """Return why nothing can be checked, or "": whether `lake` checks a one-line theorem."""
        return _probe(self)

    def _statement(self, gold: object) -> str | None:
        text = gold.strip() if isinstance(gold, str) else ""
        end = _OPEN_END.search(text[-200:])
        if end is None or _NAME.search(text) is None:
            return None
        return text[: len(text) - len(end[0])].rstrip()

    def _proof(self, statement: str, completion: str) -> str | None:
        blocks = _BLOCK.findall(completion)
        if not blocks:
            return None
        words, block = statement.split(), blocks[-1]
        # Whitespace may differ between the two; a pattern of fixed words is linear.
        stated = re.search(r"\s+".join(map(re.escape, words)) + r"\s*(?=:=)", block)
        proof = block[stated.end() :] if stated else block
        return proof.strip() or None

    def _check(self, statement: str, proof: str | None) -> tuple[float | None, Status, str]:
        if proof is None:
            return 0.0, "no_answer", "no ```lean block with a proof in it"
        if len(proof) > self.max_characters:
            return 0.0, "too_long", f"{len(proof)} characters"
        refused = next((word for word in _WORD.findall(proof) if word in REFUSED), None)
        if refused:
            return 0.0, "wrong", f"{refused} in the proof: refused unread"
        found = _NAME.search(statement)
        name = found[1] if found else ""
        if not proof.startswith(":="):
            proof = f":= {proof}" if re.match(r"by\b", proof) else f":= by\n{_indented(proof)}"
        source = f"{self.header}\n\n{statement} {proof}\n\n#print axioms {name}\n"
        try:
            code, output = self._run(source)
        except OSError as error:  # no process, no space: not the proof's doing
            return None, "unavailable", f"{self.lake} could not be started: {error}"
        if code is None:
            return 0.0, "timeout", f"no result within {self.timeout:g} s"
        if code < 0:
            return 0.0, "crash", f"lean ended on signal {-code}"
        return (0.0, "wrong", _first_error(output)) if code else _axioms(name, output)

    def _run(self, source: str) -> tuple[int | None, str]:
        """Return Lean's exit code, None past the deadline, and the start of what it wrote."""
        with tempfile.TemporaryDirectory(prefix="lean-") as folder:
            path = Path(folder, "Proof.lean")
            path.write_text(source, encoding="utf-8", errors="replace")
            process = subprocess.Popen(
                [self.lake, "env", "lean", str(path)],
                cwd=self.project,
                env={k: os.environ[k] for k in KEPT_VARIABLES if k in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            ended, output = False, b""
            try:
                ended, output = _watch(process, monotonic() + self.timeout)
            finally:
                # Before the leader is waited for, its id cannot be that of another group.
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
                if process.stdout is not None:
                    process.stdout.close()
        return code if ended else None, output.decode("utf-8", "replace")


def lean_reward(
    prompts: Sequence[object],
    completions: Sequence[object],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    answer: Sequence[object],
    finish_reasons: Sequence[str] | None = None,
    log_metric: LogMetric | None = None,
    log_extra: LogExtra | None = None,
    **columns: object,
) -> list[float | None]:
    """Reward 1.0 for a proof that Lean accepts, else 0.0 (TRL's reward signature).

    Uses the Lake project in the directory of the environment variable LEAN_PROJECT, or the working
    directory, with the text of LEAN_HEADER above every theorem.

    Args:
        prompts: Unused; part of the signature.
        completions: Strings, or lists of messages of which the last one is graded.
        completion_ids: Unused; part of the signature.
        answer: The theorem to prove, without its proof.
        finish_reasons: "stop" or "length" for each completion where the caller knows it.
        log_metric: Receives the rate of each status, as `lean/{status}_rate`.
        log_extra: Receives the columns `lean_status` and `lean_extracted`.
        columns: Other dataset columns; unused.

    Returns:
        One reward for each completion, in order; `None` without a working `lake`.

    Raises:
        ValueError: If the lists differ in length.

    Example:
        >>> lean_reward(["p"], ["no proof"], answer=["not a theorem"])
        [None]
    """
    reasons = ["stop"] * len(completions) if finish_reasons is None else finish_reasons
    if not len(completions) == len(answer) == len(reasons):
        raise ValueError(
            f"got {len(completions)} completions, {len(answer)} theorems and {len(reasons)} finish "
            "reasons; need one of each per completion: repeat the columns of a prompt for each"
        )
    verifier = LeanVerifier(os.environ.get("LEAN_PROJECT", "."), os.environ.get("LEAN_HEADER", ""))

    def verify(row: int) -> Verdict:
        text, cut = completion_text(completions[row]), reasons[row] == "length"
        return verifier.verify(answer[row], text, truncated=cut)

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # each waits for a process of its own
        verdicts = list(threads.map(verify, range(len(completions))))
    log_verdicts(verdicts, name="lean", log_metric=log_metric, log_extra=log_extra)
    return [verdict.score for verdict in verdicts]


@lru_cache(maxsize=32)
def _probe(verifier: LeanVerifier) -> str:
    if shutil.which(verifier.lake) is None:
        return f"{verifier.lake} is not installed"
    if not Path(verifier.project).is_dir():
        return f"{verifier.project} is no directory"
    name = "xrisk_probe"
    source = f"{verifier.header}\n\ntheorem {name} : 1 + 1 = 2 := rfl\n\n#print axioms {name}\n"
    try:
        code, output = verifier._run(source)
    except OSError as error:
        return f"{verifier.lake} could not be started: {error}"
    if code is None:
        return f"{verifier.lake} did not check a one-line theorem within {verifier.timeout:g} s"
    return "" if code == 0 else f"{verifier.lake} fails on a one-line theorem: {output[:200]}"


def _watch(process: "subprocess.Popen[bytes]", deadline: float) -> tuple[bool, bytes]:
    """Read until the process ends; return whether it did in time, and the start of its output."""
    kept, stream = b"", process.stdout
    with selectors.DefaultSelector() as selector:
        if stream is not None:
            selector.register(stream, selectors.EVENT_READ)
        while True:
            ended = _has_ended(process)  # asked first: what it wrote before is then in the pipe
            left = deadline - monotonic()
            chunk = _read(selector, 0.0 if ended else max(0.0, min(0.02, left)))
            kept += chunk[: MAX_OUTPUT - len(kept)]  # what is more is read and dropped
            # A child may hold the pipe open, or fill it, after its parent has ended.
            if (ended and not chunk) or left <= 0:
                return ended, kept


def _read(selector: selectors.BaseSelector, seconds: float) -> bytes:
    """Read what there is within some time; at the end of a stream, stop looking at it."""
    text = b""
    for key, _ in selector.select(seconds):
        text = os.read(key.fd, 65_536)
        if not text:
            selector.unregister(key.fileobj)
    return text


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Whether the process has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _indented(proof: str) -> str:
    return "\n".join(f"  {line}" for line in proof.splitlines())


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line]
    first = (lines or output.splitlines() or ["lean says nothing"])[0]
    return first.rpartition("error: ")[2][:200]


def _axioms(name: str, output: str) -> tuple[float, Status, str]:
    """Decide by Lean's list of the axioms that a theorem rests on."""
    if f"'{name}' does not depend on any axioms" in output:
        return 1.0, "correct", "checked, no axioms"
    used = [found[2] for found in _AXIOMS.finditer(output) if found[1] == name]
    if len(used) != 1:
        return 0.0, "wrong", "lean does not list the axioms of the theorem"
    strange = set(re.split(r",\s*", used[0].strip())) - ALLOWED_AXIOMS
    if strange:
        return 0.0, "wrong", f"rests on {', '.join(sorted(strange))}"[:200]
    return 1.0, "correct", "checked, standard axioms"
