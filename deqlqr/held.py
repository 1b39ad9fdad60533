"""What a block makes of its parameters alone, made once in a solve instead of at every evaluation.

A forward solve evaluates a block many times at the same parameters, without derivatives. Within it
`held` keeps what it is asked to make; anywhere else, where derivatives are wanted or tensors stand
for others (`torch.func`), it just makes it.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from deqlqr._checks import transformed

T = TypeVar("T")
Store = dict[Any, tuple[tuple[Tensor, ...], Any, Any]]
_MOST = 64  # values in a store: a tensor that is made anew each time is never met again
_running = threading.local()


@contextmanager
def holding(store: Store | None) -> Generator[None, None, None]:
    """Within the context `held` keeps what it makes in the store; `None` for nowhere."""
    outer = getattr(_running, "store", None)
    _running.store = store
    try:
        yield
    finally:
        _running.store = outer


def held(what: Any, make: Callable[[], T], *of: Tensor) -> T:
    """Return `make()`, or what it returned before in this solve for the same tensors.

    Args:
        what: Names what is made, together with its options.
        make: Makes it, from nothing but these tensors and options.
        of: The tensors it is made of.
    """
    store: Store | None = getattr(_running, "store", None)
    if store is None or torch.is_grad_enabled() or transformed():
        return make()
    if torch.is_inference_mode_enabled() or any(t.is_inference() for t in of):
        return make()  # such tensors count no versions
    key = what, _autocast(of), *(id(t) for t in of)
    if key in store:
        _, versions, value = store[key]
        if versions == _versions(of, value):
            return value
    value = make()
    if len(store) >= _MOST:
        store.clear()
    store[key] = of, _versions(of, value), value  # holds the tensors, so that their ids stay theirs
    return value


def _versions(of: tuple[Tensor, ...], value: Any) -> tuple[int, ...]:
    """Return what changes when a tensor that went in, or came out, is changed in place."""
    made = value if isinstance(value, tuple) else (value,)
    return tuple(t._version for t in (*of, *made) if isinstance(t, Tensor))


def _autocast(of: tuple[Tensor, ...]) -> tuple[bool, torch.dtype]:
    kind = of[0].device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
