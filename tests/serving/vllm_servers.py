"""A real server over HTTP, and what it has to answer by transformers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_xrisk.models.tempnet import TempNet
from llm_xrisk.serving import TempNetLogitsProcessor

START_SECONDS = 400  # 30 on an idle machine
SMALL = [
    *("--enforce-eager", "--gpu-memory-utilization", "0.1", "--max-num-seqs", "8"),
    *("--max-model-len", "64", "--max-logprobs", "-1", "--return-tokens-as-token-ids"),
]


def tempnet(vocab_size: int, **options: Any) -> TempNet:
    """Temperatures that differ from token to token, and from 1."""
    settings = {"rho": 0.5, "hidden_size": 16, "tau_min": 0.2, "tau_max": 3.0} | options
    net = TempNet(vocab_size, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return net.eval()


def expected_log_probs(
    model: nn.Module,
    prompt: list[int],
    completion: list[int],
    net: TempNet | None,
    temperature: float = 1.0,
) -> Tensor:
    """(tokens, V) of what the next tokens are sampled from, by transformers."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    if net is not None:
        logits = TempNetLogitsProcessor(net)(ids, logits)
    return (logits / temperature).log_softmax(-1)


class Server:
    """A process of ``llm-xrisk serve``, its port and what it wrote."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def post(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """Status and answer of a request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=200) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def models(self) -> list[str]:
        """The names a request may ask for."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models") as answer:
            return [entry["id"] for entry in json.load(answer)["data"]]

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(START_SECONDS):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self.log.read_text()[-4000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health").close()
                return
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"no answer in time:\n{self.log.read_text()[-4000:]}")

    def interrupt(self) -> int:
        """Ctrl-C, as a terminal sends it: to the process and all that it started."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(timeout=90)


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended just now
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@contextmanager
def served(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    """``llm-xrisk serve FOLDER`` on a free port; nothing of it is left afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llm_xrisk.cli", "serve", str(folder), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *SMALL, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, log)
    try:
        server.wait()
        yield server
    finally:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def completion_of(choice: dict[str, Any]) -> list[int]:
    """Token ids of an answer."""
    return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]


def log_probs_of(choice: dict[str, Any], vocab_size: int) -> Tensor:
    """(tokens, V) of an answer that lists the whole vocabulary."""
    found = torch.full((len(choice["logprobs"]["tokens"]), vocab_size), torch.nan)
    for row, top in enumerate(choice["logprobs"]["top_logprobs"]):
        for token, value in top.items():
            found[row, int(token.removeprefix("token_id:"))] = value
    return found
