# SPDX-License-Identifier: Apache-2.0
"""Child side of `reward.code`: runs a program, or answers calls to its functions with literals."""

import ast
import os
import sys

# Bound in this module, so that a program that changes builtins does not make it wait for ever.
from builtins import isinstance, len, repr  # noqa: UP029
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from math import isfinite, isinf, isnan
from types import CodeType, ModuleType
from typing import Any

MAX_MESSAGE = 1 << 20
MAX_TEXT = 300
MAX_DEPTH = 200  # beyond this Python's own parser refuses the literal
NAN = "\0nan"  # stands for the one float that no literal denotes


class TooLarge(ValueError):
    """A value is longer, as a literal, than a message may be."""


class NotLiteral(TypeError):
    """A value is not made of numbers, texts and the built-in containers."""


class TextLoader(SourceFileLoader):
    """Imports a module from a text instead of a file."""

    def __init__(self, name: str, source: str | CodeType) -> None:
        super().__init__(name, f"{name}.py")
        self.source = source

    def path_stats(self, path: str) -> dict[str, Any]:
        """There is no file, so there is no cached bytecode either."""
        raise OSError(f"{path} is no file")

    def get_data(self, path: str) -> bytes:
        """Return the text."""
        return str(self.source).encode()

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the code, where the caller compiled it, or compile the text."""
        return self.source if isinstance(self.source, CodeType) else super().get_code(fullname)


def load(name: str, source: str | CodeType, names: dict[str, object] | None = None) -> ModuleType:
    """Import a text as a module that finds the given names already there."""
    loader = TextLoader(name, source)
    module = module_from_spec(ModuleSpec(name, loader))
    vars(module).update(names or {})
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def names_of(module: ModuleType) -> dict[str, object]:
    """What a module defines and imports."""
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def literal(value: object, depth: int = 0) -> str:
    """Write a value as text that `ast.literal_eval` reads back as an equal one.

    A subclass of a built-in type becomes that type, as its contents are all that equality with a
    built-in value may depend on. NaN is written as a text of its own.

    Raises:
        NotLiteral: The value, or a part of it, is of another type.

    Example:
        >>> literal([1, (2.5, "a"), {"b": {3}}, float("inf"), set()])
        "[1, (2.5, 'a'), {'b': {3}}, 1e999, set()]"
    """
    if value is None or value is True or value is False or value is Ellipsis:
        return repr(value)
    if isinstance(value, int):
        small = -(10**4000) < value < 10**4000  # decimal digits are limited, and slow
        return int.__repr__(value) if small else hex(value)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, complex) and isfinite(value.real) and isfinite(value.imag):
        return complex.__repr__(value)
    if isinstance(value, str):
        return str.__repr__(value)
    if isinstance(value, bytes | bytearray):
        return repr(bytes(value))
    if depth >= MAX_DEPTH // 2:
        raise NotLiteral(f"containers nested more than {MAX_DEPTH // 2} deep")
    return _container(value, depth + 1)


def _float(value: float) -> str:
    if isnan(value):
        return repr(NAN)
    if isinf(value):
        return "1e999" if value > 0 else "-1e999"
    return float.__repr__(value)


def _container(value: object, depth: int) -> str:
    if isinstance(value, dict):
        pairs = dict.items(value)
        return f"{{{', '.join(f'{literal(k, depth)}: {literal(v, depth)}' for k, v in pairs)}}}"
    if not isinstance(value, list | tuple | set | frozenset):
        raise NotLiteral(f"a value of type {type(value).__name__}")
    parts = [literal(part, depth) for part in value]
    if isinstance(value, list):
        return f"[{', '.join(parts)}]"
    if isinstance(value, tuple):
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    return f"{{{', '.join(parts)}}}" if parts else "set()"


def send(channel: int, value: object) -> None:
    """Write one message: four bytes of length, then the literal.

    Raises:
        TooLarge: The literal is longer than a message may be; nothing was sent.
    """
    data = literal(value).encode("utf-8", "surrogatepass")
    if len(data) > MAX_MESSAGE:
        raise TooLarge(f"a value of {len(data)} bytes, over {MAX_MESSAGE}")
    data = len(data).to_bytes(4, "big") + data
    while data:
        data = data[os.write(channel, data) :]


def receive(channel: int) -> str:
    """Read one message.

    Raises:
        EOFError: The other side is gone.
        TooLarge: The message is longer than one may be; it is not read.
    """
    size = int.from_bytes(_read(channel, 4), "big")
    if size > MAX_MESSAGE:
        raise TooLarge(f"a message of {size} bytes, over {MAX_MESSAGE}")
    return _read(channel, size).decode("utf-8", "surrogatepass")


def _read(channel: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = os.read(channel, size)
        if not part:
            raise EOFError("the other side is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def parse(text: str) -> Any:
    """Read a literal; containers are rebuilt only where a NaN stands in one."""
    value = ast.literal_eval(text)
    return _with_nan(value) if repr(NAN) in text else value


def _with_nan(value: Any) -> Any:
    if value == NAN:
        return float("nan")
    if isinstance(value, list | tuple | set):
        return type(value)(_with_nan(part) for part in value)
    if isinstance(value, dict):
        return {_with_nan(key): _with_nan(part) for key, part in value.items()}
    return value


def _raised(error: BaseException) -> tuple[str, list[str], str]:
    """A message that says which exception the program raised, by the names of its classes."""
    try:
        text = str(error)[:MAX_TEXT]
    except Exception:
        text = ""
    return "error", [kind.__name__ for kind in type(error).__mro__], text


def serve(source: str, prelude: str, channel: int) -> None:
    """Import the program, then answer calls of its functions until the judge is gone."""
    failure, names = None, {}
    try:
        before = names_of(load("prelude", prelude)) if prelude else {}
        names = vars(load("solution", source, before))
    except BaseException as error:
        failure = _raised(error)
    while True:
        try:
            name, arguments, keywords = parse(receive(channel))
        except EOFError:
            return
        try:
            if failure is None and name not in names:
                raise NameError(f"the program defines no {name}")
            answer = failure or ("value", names[name](*arguments, **keywords))
            send(channel, answer)
        except BaseException as error:
            send(channel, _raised(error))


def run(payload: str, channel: int | None) -> None:
    """Run a program as a script, or serve its functions where there is a channel to a judge."""
    source, prelude = ast.literal_eval(payload)
    if channel is not None:
        try:
            serve(source, prelude, channel)
        finally:
            os._exit(0)  # whatever the program has made of this interpreter
    try:
        load("__main__", source)
    except SystemExit:
        raise
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1) from None
    raise SystemExit(0)  # the interpreter flushes, joins threads and calls what was registered
