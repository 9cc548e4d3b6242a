"""Digest what a callable is: its code, defaults, closure, globals and state, the same in every process.

>>> def longer_than(limit):
...     return lambda prompts, completions: [float(len(c) > limit) for c in completions]
>>> describe(longer_than(3))["state"], describe(longer_than(5))["state"]
({'closure.limit': 3}, {'closure.limit': 5})
>>> describe(longer_than(3))["code"] == describe(longer_than(5))["code"]
True

Nothing in it depends on where the code stands (line, file), on comments and docstrings, on addresses in memory or on
the order of sets. What cannot be read (a socket, a generator) is listed under "unread".
"""

import copyreg
import dis
import enum
import functools
import json
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from math import isfinite
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

PLAIN = (type(None), bool, int, float, complex, str, bytes)
# Objects without state that a score could depend on, which cannot be pickled.
STATELESS = ("_thread.lock", "_thread.RLock", "_thread._local", "os._Environ")
# Libraries whose objects hold connections, threads, pools and temporary files, which differ from run to run.
CLIENTS = (
    *("aiohttp", "anthropic", "asyncio", "concurrent", "http", "httpx", "logging", "multiprocessing", "openai"),
    *("queue", "requests", "selectors", "socket", "ssl", "tempfile", "threading", "urllib3"),
)
_LIBRARY = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib"))
# The package's own objects are digested by their bare names, so that its modules may move. Release 0.1, whose
# fingerprints have no "layout", digested module paths: a digest is compared with those of its own layout alone.
LAYOUT = 2
PACKAGE = __name__.partition(".")[0]
# Where functions are within a property, or under a decorator.
_WITHIN = ("fget", "fset", "func", "__func__", "__wrapped__")
# Values that are read at most: enough for any scorer, and no end where a module leads to all of a program.
_MOST = 200_000


def describe(thing: Any) -> dict[str, Any]:
    """Describe a callable by digests of its code and of each part of its state, and list what cannot be read.

    Bytecode differs between versions of Python, so digests of two versions say nothing about each other.
    """
    digester = _Digester()
    code, parts = digester.parts(thing)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    described: dict[str, Any] = {"layout": LAYOUT, "python": python, "code": code.hex()}
    if parts:
        described["state"] = {name: digester.number_or_digest(name, value) for name, value in sorted(parts.items())}
    return described | ({"unread": sorted({*digester.unread})} if digester.unread else {})


def place_free_name(thing: Any) -> str:
    """Return the name of a thing for fingerprints: its `name_of`, without the path inside this package.

    >>> from calibrated_rewards.theory import Log
    >>> place_free_name(Log), place_free_name(json.dumps)
    ('calibrated_rewards.Log', 'json.dumps')
    """
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{PACKAGE if _is_ours(named.__module__) else named.__module__}.{named.__qualname__}"


@dataclass
class _Digester:
    """A maker of digests, with the path to the value that is being read."""

    unread: list[str] = field(default_factory=list)
    _part: str = ""
    _open: list[int] = field(default_factory=list)
    """Ids of the values that hold the one that is being read: a value may hold itself."""
    _done: dict[int, tuple[Any, bytes]] = field(default_factory=dict)
    """Digests by id, with the value, which is held so that no other one gets its id."""

    def number_or_digest(self, name: str, value: Any) -> Any:
        """Return a part of the state as it is if it is a number, which explains itself, or else its digest."""
        self._part = name
        if value is None or type(value) in (bool, int) or (type(value) is float and isfinite(value)):
            return value
        return self.digest(value).hex()

    def parts(self, thing: Any) -> tuple[bytes, dict[str, Any]]:
        """Digest a callable's code, and collect the values that the code depends on, by name."""
        if isinstance(thing, functools.partial):
            code, parts = self.parts(thing.func)
            arguments = [*enumerate(thing.args), *thing.keywords.items()]
            return code, {**parts, **{f"argument.{name}": value for name, value in arguments}}
        if isinstance(thing, FunctionType):
            return self._function_code(thing), dict(_values_of(thing))
        if isinstance(thing, type | BuiltinFunctionType) or type(thing).__module__ == "functools":
            return self.digest(thing), {}
        owner = thing.__self__ if isinstance(thing, MethodType) else thing
        method = self.parts(thing.__func__) if isinstance(thing, MethodType) else (b"", {})
        code, parts = self._methods(owner if isinstance(owner, type) else type(owner))
        return _hash(method[0], code), {**parts, **method[1], **self._instance(owner)}

    def digest(self, value: Any) -> bytes:
        """Digest any value; one that holds itself, by how far up that is."""
        if type(value) in PLAIN:
            return _hash(f"{type(value).__name__}:{value!r}".encode("utf-8", "surrogatepass"))
        if id(value) in self._done:
            return self._done[id(value)][1]
        if id(value) in self._open:
            return _hash(f"cycle:{len(self._open) - self._open.index(id(value))}".encode())
        if len(self._done) > _MOST:
            return self._cannot_read(value)
        self._open.append(id(value))
        try:
            digest = self._container_or_named(value) or self._array_or_object(value)
        except Exception:  # noqa: BLE001 (a foreign __reduce__ or __getstate__ may raise anything)
            digest = self._cannot_read(value)
        finally:
            self._open.pop()
        self._done[id(value)] = value, digest
        return digest

    def _container_or_named(self, value: Any) -> bytes | None:
        """Digest a value that holds others, or has a name; None for all else."""
        if type(value) in (list, tuple):
            return self._all(type(value).__name__, value)
        if type(value) in (set, frozenset):
            return _hash(b"set:", *sorted(map(self.digest, value)))
        if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections", "types"):
            return self._mapping(value)
        if isinstance(value, enum.Enum):
            return self._all("enum", [type(value).__qualname__, value.name, value.value])
        if isinstance(value, CodeType):
            return self._code(value)
        if isinstance(value, ModuleType):
            last = value.__name__.rpartition(".")[2]
            return _hash(f"module:{f'{PACKAGE}.{last}' if _is_ours(value.__name__) else value.__name__}".encode())
        return self._class(value) if isinstance(value, type) else None

    def _array_or_object(self, value: Any) -> bytes:
        if isinstance(value, np.ndarray) and value.dtype != object:
            little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
            return _hash(f"array:{value.dtype.name}:{value.shape}".encode(), little.tobytes())
        if callable(getattr(type(value), "fingerprint", None)):
            return _hash(b"fingerprint:", json.dumps(value.fingerprint(), sort_keys=True).encode())
        if (of_torch := _of_torch(value)) is not None:
            return _hash(of_torch.encode(), self._class(type(value)), *self._layers(value))
        return self._callable_or_object(value)

    def _callable_or_object(self, value: Any) -> bytes:
        if isinstance(value, BuiltinFunctionType):
            owner = value.__self__
            name = f"{value.__module__}.{value.__qualname__}"
            return _hash(name.encode(), b"" if isinstance(owner, ModuleType | None) else self.digest(owner))
        if isinstance(value, FunctionType) and _is_installed(value.__module__):
            return _hash(f"function:{place_free_name(value)}".encode())
        if isinstance(value, FunctionType | MethodType | functools.partial):
            code, parts = self.parts(value)
            return _hash(b"callable:", code, self._mapping(parts))
        if isinstance(value, property | staticmethod | classmethod | functools.cached_property):
            return self._all(type(value).__name__, [getattr(value, name, None) for name in _WITHIN])
        if type(value).__module__ == "functools" and hasattr(value, "__wrapped__"):
            return self.digest(value.__wrapped__)  # a cache: what it holds follows from the function
        where = f"{type(value).__module__}.{type(value).__qualname__}"
        if where in STATELESS or where.partition(".")[0] in CLIENTS:
            return _hash(where.encode())
        return _hash(b"object:", self._class(type(value)), self._mapping(self._instance(value)))

    def _cannot_read(self, value: Any) -> bytes:
        self.unread.append(f"{self._part} ({type(value).__name__})" if self._part else type(value).__name__)
        return _hash(f"unread:{place_free_name(type(value))}".encode())

    def _instance(self, thing: Any) -> dict[str, Any]:
        """Collect the state of an object, as pickling would write it: attributes by name, and all else."""
        if isinstance(thing, type) or callable(getattr(type(thing), "fingerprint", None)):
            return {"self": thing}
        try:
            registered = copyreg.dispatch_table.get(type(thing))  # of compiled patterns, and what else has no method
            reduced = registered(thing) if registered else thing.__reduce_ex__(4)
        except Exception:
            # Whatever a foreign __reduce__ raises, the attributes can be read one by one.
            attributes = getattr(thing, "__dict__", None)
            if attributes is None:
                raise
            return {name: value for name, value in attributes.items() if isinstance(name, str)}
        if isinstance(reduced, str):
            return {"place": reduced}
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        whole: dict[str, Any] = {}
        if getattr(make, "__name__", "") not in ("__newobj__", "__newobj_ex__"):
            whole["made by"] = (getattr(make, "__qualname__", ""), arguments)
        elif len(arguments) > 1:
            whole["made of"] = arguments[1:]
        whole |= {"items": list(items)} if items is not None else {}
        whole |= {"pairs": dict(pairs)} if pairs is not None else {}
        attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        if not all(isinstance(each, dict | None) for each in (attributes, slots)):
            return {**whole, "state": state}
        return {**whole, **(attributes or {}), **(slots or {})}

    def _methods(self, kind: type) -> tuple[bytes, dict[str, Any]]:
        """Digest the code of a class of the user's, and collect the values that its methods find elsewhere."""
        codes, parts = [], dict[str, Any]()
        for base in kind.__mro__:
            if _is_installed(base.__module__):
                codes.append(f"class:{place_free_name(base)}".encode())
                continue
            for name, member in sorted(vars(base).items()):
                functions = [each for each in _functions_of(member) if _is_written(name, each)]
                for function in functions:
                    codes += [name.encode(), self._code(function.__code__)]
                    for label, value in _values_of(function):
                        part = label if label.startswith("global.") else f"{name}.{label}"
                        # The method of a base class may have a part of the same name, and be called by super().
                        part = part if parts.get(part, value) is value else f"{base.__qualname__}.{part}"
                        parts |= {part: value} if label != "closure.__class__" else {}
                if isinstance(member, functools.partialmethod):
                    parts[f"{name}.arguments"] = (member.args, member.keywords)
                if _is_own(name, member) and not functions:
                    parts.setdefault(f"class.{name}", member)
        return _hash(b"methods:", *codes), parts

    def _layers(self, model: Any) -> Iterator[bytes]:
        """Digest what a torch module's layers hold beside weights: rates, thresholds, attributes of the user's."""
        torch = sys.modules["torch"]
        usual = vars(torch.nn.Module())
        for name, layer in model.named_modules() if isinstance(model, torch.nn.Module) else ():
            kind = type(layer)
            settings = {label: value for label, value in vars(layer).items() if label not in usual}
            if kind.__module__.startswith("torch."):
                plain = {label: value for label, value in settings.items() if type(value) in (*PLAIN, tuple)}
                yield _hash(name.encode(), kind.__qualname__.encode(), self._mapping(plain))
            elif not _is_installed(kind.__module__):
                yield _hash(name.encode(), self._class(kind), self._mapping(settings))

    def _class(self, kind: type) -> bytes:
        """Digest a class by its name, and one of the user's by the code and values in it too."""
        if _is_installed(kind.__module__):
            return _hash(f"class:{place_free_name(kind)}".encode())
        if id(kind) in self._done:
            return self._done[id(kind)][1]
        if id(kind) in self._open and self._open[-1] != id(kind):
            return _hash(f"class:{kind.__qualname__}".encode())
        self._open.append(id(kind))
        try:
            members = {name: member for name, member in vars(kind).items() if _is_own(name, member)}
            digest = _hash(b"class:", self._all("bases", kind.__bases__), self._mapping(members))
        finally:
            self._open.pop()
        self._done[id(kind)] = kind, digest
        return digest

    def _function_code(self, function: FunctionType) -> bytes:
        """Digest a function's code; what a library's decorator puts around a function is known by its name."""
        if _is_installed_file(function.__code__.co_filename) and not _is_installed(function.__module__):
            return _hash(f"decorator:{function.__code__.co_qualname}".encode())
        return self._code(function.__code__)

    def _code(self, code: CodeType) -> bytes:
        """Digest the instructions of a code object with their constants and names, and no line of a file."""
        written = [f"{code.co_argcount} {code.co_kwonlyargcount} {code.co_flags}".encode(), code.co_exceptiontable]
        for each in dis.get_instructions(code):
            # The value that an argument stands for, since the tables behind the arguments hold docstrings as well.
            value = each.argval if isinstance(each.argval, int | str) else each.arg
            argument = self.digest(each.argval) if each.opcode in dis.hasconst else repr(value).encode()
            written.append(each.opname.encode() + b" " + argument)
        return _hash(b"code:", *written)

    def _all(self, kind: str, values: Any) -> bytes:
        if {*map(type, values)} <= {int, float, bool, str, type(None)}:  # quick for a long list of words
            return _hash(f"{kind}:{[*values]!r}".encode("utf-8", "surrogatepass"))
        return _hash(f"{kind}:".encode(), *map(self.digest, values))

    def _mapping(self, mapping: Mapping[Any, Any]) -> bytes:
        pairs = sorted((self.digest(name), self.digest(value)) for name, value in mapping.items())
        return _hash(b"mapping:", *(each for pair in pairs for each in pair))


def _functions_of(member: Any) -> list[FunctionType]:
    """List the functions of a member of a class: itself, and those in a property or under any number of decorators."""
    functions, waiting = list[FunctionType](), [member]
    while waiting:
        each = waiting.pop()
        if isinstance(each, FunctionType):
            if each in functions:
                continue
            functions.append(each)
        elif not (isinstance(each, property | staticmethod | classmethod) or type(each).__module__ == "functools"):
            continue
        waiting += [getattr(each, name, None) for name in _WITHIN]
    return functions


def _values_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield all that a function's code finds outside of itself: defaults, closure, attributes, globals."""
    code = function.__code__
    defaults = function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount][code.co_argcount - len(defaults) :]
    yield from ((f"default.{name}", value) for name, value in zip(names, defaults, strict=True))
    yield from ((f"default.{name}", value) for name, value in (function.__kwdefaults__ or {}).items())
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        yield f"closure.{name}", cell.cell_contents if _is_full(cell) else ()
    yield from ((f"attribute.{name}", each) for name, each in vars(function).items() if name != "__wrapped__")
    if not _is_installed(function.__module__):
        yield from ((f"global.{name}", value) for name, value in _globals_of(code, function.__globals__))


def _globals_of(code: CodeType, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values of the global names in code and in code within it; of a module of the user's, its member."""
    module, path = None, ""
    for each in dis.get_instructions(code):
        if each.opname == "EXTENDED_ARG":
            continue
        value: Any = None
        if module is not None and each.opname in ("LOAD_ATTR", "LOAD_METHOD") and hasattr(module, each.argval):
            value, path = getattr(module, each.argval), f"{path}.{each.argval}"
        elif each.opname in ("LOAD_GLOBAL", "LOAD_NAME") and each.argval in known:
            value, path = known[each.argval], each.argval
        elif isinstance(each.argval, CodeType):
            yield from _globals_of(each.argval, known)
        else:
            path = ""
        module = value if isinstance(value, ModuleType) and not _is_installed(value.__name__) else None
        if path and module is None:
            yield path, value
            path = ""


def _of_torch(value: Any) -> str | None:
    """Digest a tensor, a model or a tokenizer as scorers of checkpoints do; None for all else."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    from calibrated_rewards.models.fingerprint import config_digest, tokenizer_digest, weights_digest

    if isinstance(value, torch.Tensor):
        return weights_digest({"": value})
    if isinstance(value, torch.nn.Module):  # its settings beside the weights: see _layers
        config = config_digest(value.config) if hasattr(getattr(value, "config", None), "to_diff_dict") else ""
        return f"{type(value).__qualname__} {weights_digest(value.state_dict())} {config}"
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    is_tokenizer = hasattr(type(value), "special_tokens_map") and hasattr(type(value), "get_vocab")
    return tokenizer_digest(value) if is_tokenizer else None


@functools.cache
def _is_installed(module: str | None) -> bool:
    """Tell if a module is of Python, of this library or of an installed package: known by its name, not by its code."""
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names or top == PACKAGE:
        return top != "__main__"
    return _is_installed_file(getattr(sys.modules.get(module or ""), "__file__", None) or "")


def _is_ours(module: str | None) -> bool:
    """Tell if a module is of this package."""
    return (module or "").partition(".")[0] == PACKAGE


def _is_installed_file(file: str) -> bool:
    return "/site-packages/" in file or "/dist-packages/" in file or file.startswith(_LIBRARY)


def _is_written(name: str, function: FunctionType) -> bool:
    """Tell if a function of a class is its author's, rather than made by Python or by a decorator out of others."""
    file = function.__code__.co_filename
    by_dataclass = file == "<string>" and name.startswith("__") and name != "__call__"
    return not (by_dataclass or _is_installed(function.__module__) or _is_installed_file(file))


def _is_own(name: str, member: Any) -> bool:
    """Tell if a member of a class is its author's."""
    if functions := _functions_of(member):
        return any(_is_written(name, each) for each in functions)
    # A slot holds no value of the class.
    descriptor = type(member).__name__ in ("member_descriptor", "getset_descriptor")
    return not (name.startswith(("__", "_abc_")) or descriptor)


def _is_full(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _hash(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(f"{len(part)}:".encode() + part)
    return digest.digest()
