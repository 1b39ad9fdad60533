"""Checks of options that several modules make."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.nn.utils import parametrize


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    """Return `value` if it is one of `allowed`.

    Raises:
        ValueError: If it is not.
    """
    if value not in allowed:
        near = _nearest(str(value), allowed)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.{hint}")
    return value


def unknown_option(owner: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an option that does not exist, with the nearest that does."""
    known = tuple(known)
    near = _nearest(name, known)
    hint = f"did you mean {near!r}?" if near else f"it has {', '.join(known)}."
    return f"{owner} has no option {name!r}; {hint}"


def _nearest(name: str, known: tuple[str, ...]) -> str | None:
    alike = lambda a, b: len(b) > 2 and a.startswith(b)
    within = [k for k in known if alike(name, k) or alike(k, name)]
    near = within or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return near[0] if near else None


class Options:
    """Base of dataclasses of options: refuses a name they do not have, naming the nearest."""

    def __new__(cls, *_: Any, **options: Any) -> "Options":
        """Check the names.

        Raises:
            TypeError: If an option is unknown.
        """
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in options:
            if name not in known:
                raise TypeError(unknown_option(cls.__name__, name, known))
        return super().__new__(cls)


def count(name: str, value: Any, least: int = 1) -> int:
    """Return `value` if it is an int and not below `least`.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an int, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    return value


def phase_count(**sequences: Any) -> int:
    """Return the number of phases of sequences that must have one entry for each.

    Raises:
        ValueError: If one is no sequence, is empty, or is longer or shorter than the first.
    """
    lengths = {}
    for name, sequence in sequences.items():
        if not isinstance(sequence, Sequence):
            raise ValueError(
                f"{name} must be a sequence with one tensor for each phase, got "
                f"{type(sequence).__name__}."
            )
        lengths[name] = len(sequence)
    first, p = next(iter(lengths.items()))
    if p == 0:
        raise ValueError(f"{first} must have at least one phase, got none.")
    for name, length in lengths.items():
        if length != p:
            raise ValueError(f"{name} must have {p} phases like {first}, got {length}.")
    return p


def at_least(name: str, value: float, least: float, *, strict: bool = False) -> float:
    """Return `value` as a float if it is finite and not below `least` (above, if `strict`).

    Raises:
        ValueError: If it is out of range or no number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number, got {value!r}.") from error
    if not (least < number if strict else least <= number) or number == float("inf"):
        bound = f"above {least:g}" if strict else f"at least {least:g}"
        raise ValueError(f"{name} must be finite and {bound}, got {value}.")
    return number


def require_no_cache() -> None:
    """Refuse torch's cache: it would keep weights made before the parameters moved.

    Raises:
        ValueError: Within `torch.nn.utils.parametrize.cached`.
    """
    if parametrize._cache_enabled:
        raise ValueError(
            "step must be called outside torch.nn.utils.parametrize.cached(), whose weights stay "
            "as they were before the parameters changed, got a call inside."
        )


def transformed() -> bool:
    """Return whether this runs within a transform of torch.func (or torch.vmap)."""
    return bool(retrieve_all_functorch_interpreters())


def one_forward_level(name: str) -> None:
    """Refuse forward mode over forward mode, where torch drops the outer tangent unnoticed.

    Raises:
        RuntimeError: Within `torch.func.jvp` or `jacfwd` of another.
    """
    levels = [interpreter.key() for interpreter in retrieve_all_functorch_interpreters()]
    if levels.count(TransformType.Jvp) > 1:
        raise RuntimeError(
            f"{name} has no forward derivative of a forward derivative: a torch custom function "
            "loses the outer one. Use torch.func.hessian, or jacrev for one of the two."
        )


def injection(x: Tensor | None, width: int, *, image: bool = False) -> None:
    """Refuse an x that is not (batch, width), or (batch, width, height, width') for images.

    Raises:
        ValueError: If it is not.
    """
    if x is None or x.dim() != (4 if image else 2) or x.shape[1] != width:
        wanted = f"(batch, {width}, height, width)" if image else f"(batch, {width})"
        got = None if x is None else tuple(x.shape)
        raise ValueError(f"x must have shape {wanted}, got {got}.")
