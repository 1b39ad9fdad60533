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
Store = dict[Any, tuple[tuple[Tensor, ...], tuple[int, ...], Any]]
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
    if (
        store is None
        or torch.is_grad_enabled()
        or transformed()
        or any(t.is_inference() for t in of)
    ):
        return make()
    key = what, *(id(t) for t in of)
    versions = tuple(t._version for t in of)
    if key in store and store[key][1] == versions:
        return store[key][2]
    value = make()
    store[key] = of, versions, value  # holds the tensors, so that their ids stay theirs
    return value
