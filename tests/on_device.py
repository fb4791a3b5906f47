"""Running the tests on another device: XRISK_TEST_DEVICE=cuda puts every new tensor there."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NEW = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.multinomial}
IN_PLACE = {Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.exponential_}


class RandomNumbersOfTheCPU(TorchFunctionMode):
    """Draws random numbers on the CPU and moves them, so that every device sees the same data.

    Generators of tests are the CPU's too; a device would refuse them.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in IN_PLACE:
            target = args[0]
            drawn = func(
                torch.empty(target.shape, dtype=target.dtype, device="cpu"), *args[1:], **kwargs
            )
            with torch.no_grad():
                return target.copy_(drawn)
        if func not in NEW or "device" in kwargs:
            return func(*args, **kwargs)
        asked = kwargs.pop("requires_grad", False)
        host = [a.cpu() if isinstance(a, Tensor) else a for a in args]
        with torch.device("cpu"):
            drawn = func(*host, **kwargs)
        return drawn.to(self.device).requires_grad_(asked)


def move_tests_to(device: str) -> None:
    """Make ``device`` the default one until the process ends, and its sums repeatable."""
    torch.set_default_device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    RandomNumbersOfTheCPU(device).__enter__()
