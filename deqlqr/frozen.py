"""One solve, one map: what would change between evaluations of a block is held still.

Random numbers (dropout, noise) start from the same state at every evaluation, and so do buffers
that an evaluation changes (spectral normalisation's vectors, counters). Batch normalisation
normalises by its running statistics, which take part in training by one evaluation at the fixed
point. Autocast is as it was when the solve began, also when the block is evaluated again in the
backward pass.

Within `torch.nn.utils.parametrize.cached` a solve makes its parametrised weights once, without a
graph, and leaves them to nobody: derivatives make their own.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from deqlqr._checks import transformed
from deqlqr.held import Store, holding

T = TypeVar("T")
_Cache = dict[tuple[int, str], Tensor | None]


class Frozen:
    """Calls functions of a block under the state of the moment at which this was made.

    Random numbers of `torch.Generator` objects of the block's own are not held.

    Attributes:
        random: The block draws random numbers; `None` before its first evaluation. Such a block
            must be given the whole batch, for its draws belong to rows.
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.device = device
        self.modes = [(module, module.training) for module in block.modules()]
        self.norms = [
            module
            for module, training in self.modes
            if training and isinstance(module, _NormBase) and module.running_mean is not None
        ]
        for i, (module, _) in enumerate(self.modes):
            if module in self.norms:
                self.modes[i] = module, False
        self.autocast = self._autocast()
        self.random: bool | None = None
        self._start: list[Tensor] = []
        self._end: list[Tensor] = []
        # Buffers that evaluations change, with what they held before and after the first.
        self._moving: list[tuple[Tensor, Tensor, Tensor]] = []
        self._watched = list(block.buffers()) if block.training else []
        # Weights that the solve has made, as long as it lasts.
        self._weights: _Cache | None = {}
        self._held: Store | None = {}

    def __call__(self, evaluate: Callable[[], T]) -> T:
        """Return `evaluate()`, under the state held."""
        with ExitStack() as stack:
            wrong = [module for module, training in self.modes if module.training != training]
            for module in wrong:
                module.training = not module.training
            stack.callback(_switch, wrong)
            if self._autocast() != self.autocast:
                enabled, dtype = self.autocast
                stack.enter_context(torch.autocast(self.device.type, dtype, enabled=enabled))
            stack.enter_context(holding(self._held))
            if parametrize._cache_enabled:
                stack.enter_context(self._own_weights())
            if self.random is None:
                return self._first(evaluate)
            if self.random:
                stack.callback(self._set_states, self._states())
                self._set_states(self._start)
            for buffer, before, _ in self._moving:
                buffer.copy_(before)
            return evaluate()

    @property
    def moves(self) -> bool:
        """Whether evaluations may change buffers."""
        return bool(self._moving) or (self.random is None and bool(self._watched))

    def _first(self, evaluate: Callable[[], T]) -> T:
        before = self._states()
        held = [(buffer, buffer.clone(), buffer._version) for buffer in self._watched]
        value = evaluate()
        self._moving = [(b, old, b.clone()) for b, old, version in held if b._version != version]
        after = self._states()
        self.random = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        if self.random:
            self._start, self._end = before, after
        return value

    @torch.no_grad()
    def advance(self) -> None:
        """Leave random numbers and buffers where one evaluation would have left them."""
        if self.random:
            self._set_states(self._end)
        for buffer, _, after in self._moving:
            buffer.copy_(after)
        self._moving = []
        self._weights = self._held = None

    @torch.no_grad()
    def update_statistics(self, evaluate: Callable[[], object]) -> None:
        """Let batch normalisation see the fixed point once."""
        if self.norms:
            for norm in self.norms:
                norm.training = True
            held, self.modes = self.modes, []
            try:
                self(evaluate)
            finally:
                self.modes = held

    @contextmanager
    def _own_weights(self) -> Generator[None, None, None]:
        """Put a cache of this solve, or of this evaluation, in place of torch's.

        A weight that was made without a graph, or from parameters put in place of the module's
        own, must not be met by others.
        """
        solving = not (self.random or torch.is_grad_enabled() or transformed())
        kept = self._weights if solving else None
        others, parametrize._cache = parametrize._cache, {} if kept is None else kept
        try:
            yield
        finally:
            parametrize._cache = others

    def _autocast(self) -> tuple[bool, torch.dtype]:
        kind = self.device.type
        return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def _states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _set_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)


def _switch(modules: list[nn.Module]) -> None:
    for module in modules:
        module.training = not module.training
