"""The temperatures of a TempNet in vLLM, by a plug-in that every vLLM of the environment loads.

For a model without a TempNet it does nothing. A TempNet is found by its ``tempnet_config.json`` in
the model's folder, or by the setting ``--additional-config '{"tempnet": "FOLDER"}'``
(``LLM(..., additional_config={"tempnet": folder})``), where ``false`` leaves it out.
"""

from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from llm_xrisk.serving.tempnet_folder import NO, SETTING, said, tempnet_folder

_INTERFACES = ("vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor")
_YES = (True, 1, "1", "true", None)
_GREEDY = 1e-5  # vLLM takes the largest logit at a temperature below


def _interfaces() -> tuple[type, ...]:
    """What the two model runners of vLLM want a processor to be; both take the same plug-ins.

    An interface that this vLLM lacks is no reason to fail, for the plug-in is loaded either way.
    """
    found = []
    for module in _INTERFACES:
        with suppress(ImportError, AttributeError):
            found.append(import_module(module).LogitsProcessor)
    return tuple(found)


class TempNetVLLMProcessor(*_interfaces()):  # pyright: ignore[reportGeneralTypeIssues]
    r"""Samples at the temperatures a TempNet predicts: logits / tau, row by row.

    It acts on the model's logits, before the request's temperature, min-p, top-k and top-p. A
    temperature T therefore multiplies: softmax(s / (tau T)); leave it at 1, which is vLLM's default
    unless ``generation_config.json`` says otherwise. Tokens that are ruled out (structured output,
    allowed tokens, bad words, min_tokens) stay so and say nothing about tau. ``logit_bias`` acts
    before this; repetition, presence and frequency penalties act on logits / tau in vLLM's model
    runner V1 and before this in V2: with them tau is predicted from logits the network was not
    trained on.

    Greedy requests (temperature 0) are left as they are, and so are their log-probs. So is a
    request with ``extra_args={"tempnet": False}`` (over HTTP ``"vllm_xargs": {"tempnet": 0}``), and
    a row of NaN or infinite logits. ``logprobs_mode="processed_logprobs"`` returns log-probs at
    tau; vLLM's default, and the log-probs of a prompt, are the model's own.

    One class serves both model runners: V1 numbers the rows of a batch and reports moves, V2 gives
    a request a slot and says in each step which slots the rows belong to.

    Args:
        vllm_config: vLLM's configuration.
        place: The device (V1), or the states of the requests, which know it (V2).
        is_pin_memory: Not used.

    Raises:
        FileNotFoundError: the folder in the setting holds no TempNet.
        ValueError: the TempNet is for another vocabulary; or drafts are sampled speculatively.

    Example:
        ``LLM("model", additional_config={"tempnet": "folder"})``, or ``vllm serve model`` with the
        TempNet in the model's folder.
    """

    def __init__(self, vllm_config: Any, place: Any, is_pin_memory: bool = False) -> None:
        self.net = _tempnet_of(vllm_config)
        self.tempered: dict[int, bool] = {}  # rows (V1) or slots (V2) that are to be divided
        self.mask: Tensor | None = None  # (rows,) V1, (slots,) V2; None in V1: every row
        self.changed = False
        if self.net is not None:
            self.device = torch.device(getattr(place, "device", place))
            self.num_slots = getattr(place, "max_num_reqs", 0)
            self.net.to(self.device)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request whose ``extra_args["tempnet"]`` is neither yes nor no.

        Raises:
            ValueError: which a server answers with status 400.
        """
        _wanted(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """False with a TempNet, though it is: the others run after temperature and min-p."""
        return self.net is None

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows of the batch (model runner V1)."""
        if self.net is None or batch_update is None:
            return
        from vllm.v1.sample.logits_processor import process_dict_updates

        process_dict_updates(self.tempered, batch_update, lambda p, *_: _wanted(p) or None)
        size = batch_update.batch_size
        self.mask = None if len(self.tempered) == size else self._table(size)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a request into a slot (model runner V2); whether its logits will be divided."""
        if self.net is None:
            return False
        self.changed = True
        self.tempered.pop(req_idx, None)
        if _wanted(sampling_params):
            self.tempered[req_idx] = True
        return req_idx in self.tempered

    def apply_staged_writes(self) -> None:
        """Bring the slots to the device (model runner V2)."""
        if self.changed:
            self.mask, self.changed = self._table(self.num_slots), False

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Logits (rows, V) over temperature.

        Args:
            logits: (rows, V) float32.
            ctx: Which slots the rows belong to (model runner V2).
        """
        if self.net is None or not self.tempered:
            return logits
        mask = self.mask
        if ctx is not None:
            if not any(slot in self.tempered for slot in ctx.idx_mapping_np.tolist()):
                return logits
            mask = None if mask is None else mask[ctx.expanded_idx_mapping]
        tau = self.net.predict(logits).nan_to_num_(nan=1.0)  # NaN must not end a server
        tau = tau if mask is None else tau.where(mask, 1.0)
        # which logit is the largest matters to greedy requests, and these are not divided
        return (logits / tau.unsqueeze(1)).to(logits.dtype)

    def _table(self, size: int) -> Tensor:
        return torch.tensor([k in self.tempered for k in range(size)], device=self.device)


def _tempnet_of(vllm_config: Any) -> Any:
    settings = getattr(vllm_config, "additional_config", None)
    setting = settings.get(SETTING) if isinstance(settings, dict) else None
    model_config = vllm_config.model_config
    folder = tempnet_folder(str(model_config.model), setting)
    if folder is None:
        return None
    from vllm.logger import init_logger

    from llm_xrisk.models.tempnet import TempNet

    if vllm_config.speculative_config is not None:
        raise ValueError(
            f"speculative decoding with the TempNet of {folder}: drafts would be accepted at other "
            "temperatures; leave it out, or serve with --additional-config '{\"tempnet\": false}'"
        )
    net = TempNet.from_pretrained(folder, vocab_size=model_config.get_vocab_size())
    low, high = net.config.tau_min, net.config.tau_max
    init_logger(f"vllm.{__name__}").info("TempNet of %s: tau from %g to %g", folder, low, high)
    return net


def _wanted(sampling_params: Any) -> bool:
    """Whether the logits of a request are to be divided."""
    wish = said((sampling_params.extra_args or {}).get(SETTING))
    if wish not in _YES + NO:
        raise ValueError(
            f"{SETTING}={wish!r} of the request; need true to sample at the temperatures of the "
            "TempNet, false not to, or nothing"
        )
    return wish in _YES and sampling_params.temperature >= _GREEDY
