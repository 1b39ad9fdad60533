"""Where a model uses its parameters: every operation in which a parameter meets the data.

The derivative of a sample's output with respect to a parameter is a sum over such uses. In each it
comes from what went into the operation, a, and the cotangent g of what came out:

    (U1)  linear, convolution   g a', a the pixels under the kernel, summed over positions
    (U2)  norm's scale          sum of g times the normalised a
    (U3)  shift (bias)          sum of g

so one backward pass, which only has to bring the g, gives every sample's own gradient. Any other
operation is applied sample by sample to copies of the parameter, whose gradients they are.

Source of (U1): I. Goodfellow (2015), Efficient per-example gradient computations, arXiv:1510.01799;
G. Rochette, A. Manoel, E. Tramel (2019), arXiv:1912.06015 (convolutions).
"""

import math
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

_CACHED = 2**18  # numbers that stay in a CPU's cache while they are copied and used


@dataclass(frozen=True)
class Use:
    """One use of a parameter, or of a tensor made from parameters only.

    Attributes:
        operand: The tensor used.
        edge: Where in the graph the cotangent g is read.
    """

    operand: Tensor
    edge: GradientEdge

    def rows(self, g: Tensor) -> Tensor:
        """Return each sample's gradient (batch, *operand) from g (batch, ...)."""
        raise NotImplementedError

    def rows_of_each(self, gs: Sequence[Tensor]) -> Tensor:
        """Return the gradients (batch, r, *operand) from r such g."""
        return torch.stack([self.rows(g) for g in gs], dim=1)


@dataclass(frozen=True)
class Factored(Use):
    """A use whose gradient is a product g a' of what came out and what went in (U1)."""

    def inputs(self) -> Tensor:
        """Return a, `(batch, positions, in)`."""
        raise NotImplementedError

    def outputs(self, g: Tensor) -> Tensor:
        """Return g as `(batch, positions, out)`."""
        raise NotImplementedError

    def rows(self, g: Tensor) -> Tensor:
        """Return g a', summed over positions."""
        return self.rows_of_each([g])[:, 0]

    def rows_of_each(self, gs: Sequence[Tensor]) -> Tensor:
        """Return g a' of each g, summed over positions: a is read once for all."""
        a, g = self.inputs(), _joined([self.outputs(g) for g in gs], -1)
        if a.shape[1] == 1:
            outer = g[:, 0, :, None] * a[:, 0, None, :]
        else:
            outer = g.mT @ a
        return outer.reshape(len(a), len(gs), *self.operand.shape)


@dataclass(frozen=True)
class Linear(Factored):
    """a W': W (out, in) is the operand."""

    a: Tensor

    def inputs(self) -> Tensor:
        """Return a as `(batch, positions, in)`."""
        a = self.a.to(self.operand.dtype)
        return a.reshape(len(a), -1, a.shape[-1])

    def outputs(self, g: Tensor) -> Tensor:
        """Return g as `(batch, positions, out)`."""
        return g.reshape(len(g), -1, g.shape[-1])


@dataclass(frozen=True)
class MatMul(Linear):
    """a W: W (in, out) is the operand."""

    def rows_of_each(self, gs: Sequence[Tensor]) -> Tensor:
        """Return a g' of each g, summed over positions."""
        return torch.stack([self.inputs().mT @ self.outputs(g) for g in gs], dim=1)


@dataclass(frozen=True)
class Conv2d(Factored):
    """A convolution with one group; W (out, in, h, w) is the operand."""

    a: Tensor
    stride: Any
    padding: Any
    dilation: Any

    def inputs(self) -> Tensor:
        """Return the pixels under the kernel at each position."""
        size = self.operand.shape[2:]
        a = self.a.to(self.operand.dtype)
        return F.unfold(a, size, self.dilation, self.padding, self.stride).mT

    def outputs(self, g: Tensor) -> Tensor:
        """Return g at each position."""
        return g.flatten(2).mT

    def rows_of_each(self, gs: Sequence[Tensor]) -> Tensor:
        """Return g a' of each g, summed over positions: the pixels are copied once for all."""
        (high, wide), strides = self.operand.shape[2:], _pair(self.stride)
        dilations, (above, beside) = _pair(self.dilation), _pair(self.padding)
        a = F.pad(self.a.to(self.operand.dtype), (beside, beside, above, above)).contiguous()
        g = _joined(gs, 1)
        windows = a.shape[1], high, wide, *g.shape[2:]
        moves = (
            step * a.stride(d)
            for steps in (dilations, strides)
            for d, step in zip((2, 3), steps, strict=True)
        )
        seen = a.as_strided((len(a), *windows), (a.stride(0), a.stride(1), *moves))
        outer = g.new_empty(*g.shape[:2], a.shape[1] * high * wide)
        # Some samples at a time, for what is copied stays in a CPU's cache then.
        count = len(a) if a.is_cuda else max(1, _CACHED // math.prod(windows))
        room = a.new_empty(min(count, len(a)), *windows)
        for start in range(0, len(a), count):
            part = slice(start, start + count)
            pixels = room[: len(a[part])].copy_(seen[part]).flatten(4).flatten(1, 3)
            torch.bmm(g[part].flatten(2), pixels.mT, out=outer[part])
        return outer.reshape(len(a), len(gs), *self.operand.shape)


@dataclass(frozen=True)
class ConvTranspose2d(Use):
    """A transposed convolution with one group; W (in, out, h, w) is the operand."""

    a: Tensor
    stride: Any
    padding: Any
    dilation: Any

    def rows(self, g: Tensor) -> Tensor:
        """Return a g' (U1), with g under the kernel at each position of a."""
        size = self.operand.shape[2:]
        under = F.unfold(g, size, self.dilation, self.padding, self.stride)
        a = self.a.to(self.operand.dtype)
        # An output padding of a stride or more leaves room for the kernel beyond the last position.
        high, wide = self.a.shape[2:]
        under = under.unflatten(2, (-1, self._places(g)))[:, :, :high, :wide].flatten(2)
        return (a.flatten(2) @ under.mT).reshape(len(a), *self.operand.shape)

    def _places(self, g: Tensor) -> int:
        """Return how many places the kernel has along the last axis of g."""
        stride, padding, dilation = (
            _pair(option)[1] for option in (self.stride, self.padding, self.dilation)
        )
        reach = dilation * (self.operand.shape[3] - 1) + 1
        return (g.shape[3] + 2 * padding - reach) // stride + 1


@dataclass(frozen=True)
class Scale(Use):
    """A norm's scale (U2); the operand has the shape of the dimensions from `axis` on, cut off."""

    normalised: Callable[[], Tensor]
    axis: int

    def rows(self, g: Tensor) -> Tensor:
        """Return the sum over positions of g times the normalised input."""
        return self.rows_of_each([g])[:, 0]

    def rows_of_each(self, gs: Sequence[Tensor]) -> Tensor:
        """Return these sums for each g: the input is normalised once for all."""
        a = self.normalised().to(gs[0].dtype)
        return torch.stack([_summed(g * a, self.operand, self.axis) for g in gs], dim=1)


@dataclass(frozen=True)
class Shift(Use):
    """Something added at every position (U3), to the dimensions from `axis` on."""

    axis: int

    def rows(self, g: Tensor) -> Tensor:
        """Return the sum of g over positions."""
        return _summed(g, self.operand, self.axis)


@dataclass(frozen=True)
class Copied(Use):
    """A parameter given to each sample as a copy; g is the gradient of the copies."""

    def rows(self, g: Tensor) -> Tensor:
        """Return g."""
        return g.reshape(len(g), *self.operand.shape)


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Return tensors side by side; one alone without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _pair(option: Any) -> tuple[int, int]:
    """Return an option of a convolution for height and width."""
    one, other = (option, option) if isinstance(option, int) else (*option, option[0])[:2]
    return one, other


def _summed(g: Tensor, operand: Tensor, axis: int) -> Tensor:
    """Sum g over all dimensions but the first and those of the operand, which begin at `axis`."""
    axis = axis % g.dim()
    kept = (0, *range(axis, axis + operand.dim()))
    others = [d for d in range(g.dim()) if d not in kept]
    return g.sum(others) if others else g


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """Return the leaves of the graph that a tensor is made from."""
    nodes, seen, leaves = [tensor.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.append(variable)
        nodes.extend(parent for parent, _ in node.next_functions)
    return leaves


def _tensors_in(*values: Any) -> list[Tensor]:
    """Return all tensors in values that may be nested."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None and not isinstance(value, (int, float, str)):
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


class Pin(Protocol):
    """A DEQ layer at its fixed point.

    Attributes:
        fz: f(z*), in the graph, flat.
    """

    fz: Tensor

    def costates(self, cotangents: Sequence[Tensor], tol: float | None) -> Sequence[Tensor]:
        """Return the cotangents of f for those of z*, all (batch, n)."""


@dataclass
class Cut:
    """Whether cotangents end at the outputs of DEQ layers, for now.

    Kept apart from `Uses`, which holds the graph: the graph's own nodes look here.

    Attributes:
        on: They do.
    """

    on: bool = False


class Uses(TorchFunctionMode):
    """Within this context every operation that mixes parameters with data is recorded.

    Attributes:
        found: The uses, in the order of the forward pass.
        mixing: Name of an operation that mixes the samples of a batch, if one was met.
        refused: Why single samples have no gradient, if an operation was met that has none.
        paused: Record nothing for now.
        cut: Of the DEQ layers that are recorded.
        pins: The DEQ layers met, in the order of the forward pass, and where in the graph the
            cotangent of each is read.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.found: list[Use] = []
        self.mixing: str | None = None
        self.refused: str | None = None
        self.paused = False
        self.cut = Cut()
        self.pins: list[tuple[GradientEdge, Pin]] = []
        self._data: dict[int, weakref.ref[Tensor]] = {}

    @contextmanager
    def pausing(self) -> Generator[None, None, None]:
        """Within this context nothing is recorded, at no cost."""
        self.paused = True
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self.paused = False

    def mark(self, values: Any) -> None:
        """Remember the tensors in `values` as data, which is what depends on the sample."""
        for value in _tensors_in(values):
            self._data[id(value)] = weakref.ref(value)

    def _is_data(self, value: Tensor) -> bool:
        reference = self._data.get(id(value))
        return reference is not None and reference() is value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors_in(*args, *kwargs.values())
        if not any(self._is_data(t) for t in tensors):
            return func(*args, **kwargs)
        operands = [t for t in tensors if t.requires_grad and not self._is_data(t)]
        if operands and torch.is_grad_enabled():
            record = _RECORDERS.get(_name(func), Uses._sample_by_sample)
            try:
                result = record(self, func, args, kwargs, operands)
            except _Refused as refusal:
                self.refused = self.refused or str(refusal)
                result = func(*args, **kwargs)
        else:
            if _name(func) == "batch_norm" and (
                args[5] if len(args) > 5 else kwargs.get("training")
            ):
                self.mixing = "batch_norm"
            result = func(*args, **kwargs)
        self.mark(result)
        return result

    def _linear(self, func: Any, args: tuple, kwargs: dict, operands: list[Tensor]) -> Any:
        a, W, bias = _values(args, kwargs, input=None, weight=None, bias=None)
        if not self._is_data(a) or self._is_data(W) or (bias is not None and self._is_data(bias)):
            return self._sample_by_sample(func, args, kwargs, operands)
        return self._affine(func, args, kwargs, a, bias, -1, Linear, W, a.detach())

    def _matmul(self, func: Any, args: tuple, kwargs: dict, operands: list[Tensor]) -> Any:
        a, W = (*args, *kwargs.values())[:2]
        if not self._is_data(a) or W.dim() != 2 or a.dim() < 2:
            return self._sample_by_sample(func, args, kwargs, operands)
        return self._affine(func, args, kwargs, a, None, -1, MatMul, W, a.detach())

    def _conv2d(self, func: Any, args: tuple, kwargs: dict, operands: list[Tensor]) -> Any:
        a, W, bias, stride, padding, dilation, groups = _values(
            args, kwargs, input=None, weight=None, bias=None, stride=1, padding=0, dilation=1,
            groups=1,
        )  # fmt: skip
        plain = self._is_data(a) and not self._is_data(W) and groups == 1
        if not plain or isinstance(padding, str) or a.dim() != 4:
            return self._sample_by_sample(func, args, kwargs, operands)
        window = a.detach(), stride, padding, dilation
        return self._affine(func, args, kwargs, a, bias, 1, Conv2d, W, *window)

    def _conv_transpose2d(
        self, func: Any, args: tuple, kwargs: dict, operands: list[Tensor]
    ) -> Any:
        a, W, bias, stride, padding, _, groups, dilation = _values(
            args, kwargs, input=None, weight=None, bias=None, stride=1, padding=0,
            output_padding=0, groups=1, dilation=1,
        )  # fmt: skip
        plain = self._is_data(a) and not self._is_data(W) and groups == 1
        if not plain or a.dim() != 4:
            return self._sample_by_sample(func, args, kwargs, operands)
        about = a.detach(), stride, padding, dilation
        return self._affine(func, args, kwargs, a, bias, 1, ConvTranspose2d, W, *about)

    def _group_norm(self, func: Any, args: tuple, kwargs: dict, operands: list[Tensor]) -> Any:
        a, groups, scale, shift, eps = _values(
            args, kwargs, input=None, num_groups=None, weight=None, bias=None, eps=1e-5
        )
        normalised = lambda: F.group_norm(a.detach(), groups, eps=eps)
        return self._affine(func, args, kwargs, a, shift, 1, Scale, scale, normalised, 1)

    def _layer_norm(self, func: Any, args: tuple, kwargs: dict, operands: list[Tensor]) -> Any:
        a, shape, scale, shift, eps = _values(
            args, kwargs, input=None, normalized_shape=None, weight=None, bias=None, eps=1e-5
        )
        axis, normalised = -len(shape), lambda: F.layer_norm(a.detach(), shape, eps=eps)
        return self._affine(func, args, kwargs, a, shift, axis, Scale, scale, normalised, axis)

    def _batch_norm(self, func: Any, args: tuple, kwargs: dict, operands: list[Tensor]) -> Any:
        a, mean, variance, scale, shift, training, _, eps = _values(
            args, kwargs, input=None, running_mean=None, running_var=None, weight=None, bias=None,
            training=False, momentum=0.1, eps=1e-5,
        )  # fmt: skip
        if training:
            self.mixing, mean, variance = "batch_norm", None, None
        normalised = lambda: F.batch_norm(a.detach(), mean, variance, training=training, eps=eps)
        return self._affine(func, args, kwargs, a, shift, 1, Scale, scale, normalised, 1)

    def _affine(
        self,
        func: Any,
        args: tuple,
        kwargs: dict,
        a: Tensor,
        shift: Tensor | None,
        axis: int,
        use: Callable[..., Use],
        operand: Tensor | None,
        *about: Any,
    ) -> Any:
        """Apply an operation on a that multiplies by an operand and adds a shift from `axis` on."""
        self._require_batch(func, a)
        result = func(*args, **kwargs)
        edge = get_gradient_edge(result)
        if operand is not None and operand.requires_grad:
            self.found.append(use(operand, edge, *about))
        if shift is not None and shift.requires_grad:
            self.found.append(Shift(shift, edge, axis))
        return result

    def _elementwise(self, func: Any, args: tuple, kwargs: dict, operands: list[Tensor]) -> Any:
        data = [t for t in _tensors_in(*args, *kwargs.values()) if self._is_data(t)]
        dims = data[0].dim()
        plain = all(t.dim() == dims and t.shape[0] == self.batch for t in data)
        if not plain or any(p.dim() > dims for p in operands):
            return self._sample_by_sample(func, args, kwargs, operands)
        copies = {}
        for p in operands:
            if p.dim() == dims and p.shape[0] != 1:
                raise _Refused(func, f"a parameter of shape {tuple(p.shape)} is a sample's own")
            inner = p[0] if p.dim() == dims else p
            lead = [1] * (dims - 1 - inner.dim())
            copies[id(p)] = inner.expand(self.batch, *lead, *inner.shape)
        self._record_copies(operands, copies)
        put = lambda t: copies.get(id(t), t) if isinstance(t, Tensor) else t
        args, kwargs = tree_map(put, (args, kwargs))
        return func(*args, **kwargs)

    def _sample_by_sample(
        self, func: Any, args: tuple, kwargs: dict, operands: list[Tensor]
    ) -> Any:
        leaves, nest = tree_flatten((args, kwargs))
        copies = {id(p): p.expand(self.batch, *p.shape) for p in operands}
        places, moving = [], []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and id(leaf) in copies:
                places.append(i)
                moving.append(copies[id(leaf)])
            elif isinstance(leaf, Tensor) and self._is_data(leaf):
                self._require_batch(func, leaf)
                places.append(i)
                moving.append(leaf[:, None])

        def of_one(*values: Tensor) -> Any:
            filled = list(leaves)
            for i, value in zip(places, values, strict=True):
                filled[i] = value
            one_args, one_kwargs = tree_unflatten(filled, nest)
            return tree_map(lambda t: t[0], func(*one_args, **one_kwargs))

        self._record_copies(operands, copies)
        try:
            return torch.vmap(of_one, randomness="different")(*moving)
        except (RuntimeError, IndexError, TypeError) as error:
            raise _Refused(func, f"torch.vmap refused it ({error})") from error

    def _record_copies(self, operands: list[Tensor], copies: dict[int, Tensor]) -> None:
        for p in operands:
            self.found.append(Copied(p, get_gradient_edge(copies[id(p)])))

    def _require_batch(self, func: Any, a: Tensor) -> None:
        if a.dim() < 1 or a.shape[0] != self.batch:
            raise _Refused(func, f"data of shape {tuple(a.shape)} has not the batch first")


def _values(args: tuple, kwargs: dict, **defaults: Any) -> list[Any]:
    """Return the values of an operation's arguments, named in their order with their defaults."""
    names = list(defaults)[len(args) :]
    return [*args, *(kwargs.get(name, defaults[name]) for name in names)]


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


class _Refused(Exception):
    """An operation has no gradient of single samples, and why."""

    def __init__(self, func: Any, reason: str) -> None:
        super().__init__(
            f"model uses a parameter in {_name(func)!r} in a way that has no gradient of single "
            f"samples ({reason}); take route='krylov', which needs none."
        )


_ELEMENTWISE = (
    *("add", "add_", "__radd__", "__iadd__", "sub", "sub_", "rsub", "__rsub__", "__isub__"),
    *("mul", "mul_", "__rmul__", "__imul__", "div", "div_", "true_divide", "__rtruediv__"),
)
_RECORDERS: dict[str, Callable[..., Any]] = {
    "linear": Uses._linear,
    "matmul": Uses._matmul,
    "mm": Uses._matmul,
    "__matmul__": Uses._matmul,
    "conv2d": Uses._conv2d,
    "conv_transpose2d": Uses._conv_transpose2d,
    "group_norm": Uses._group_norm,
    "layer_norm": Uses._layer_norm,
    "batch_norm": Uses._batch_norm,
    **dict.fromkeys(_ELEMENTWISE, Uses._elementwise),
}
