"""Which parameters are the controls of which phase, and what the states carry (N5).

    (N5)  e_j <- e_j + df_j/du u,     s_{j+1} = A_j s_j + B_j u_j + e_j

A parameter is a control of the first phase that uses it, and its effect on a later layer j is
carried there in the state.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import jvp, vjp

from deqlqr.input_map import InputMap, ProductMap
from deqlqr.layers import Layer, Layers
from deqlqr.linearize_samples import Minibatch


class Plan:
    """Which parameters are the controls of which phase, and what the states carry (N5).

    Attributes:
        own: Numbers of the parameters that are each phase's controls; phase 0 reads the output.
        controls: Their entries in u.
    """

    def __init__(self, at: Layers, layers: Sequence[Layer]) -> None:
        self._at, self._layers = at, layers
        self._sizes, self._names = at.controls.sizes, at.controls.names
        self._widths = {k: layer.A.shape[-2] for k, layer in enumerate(layers, 1)}
        used, count = at.used, len(at.controls.parameters)
        # What acts on the output directly is a control where the output is read.
        place = lambda i: next((k for k, some in enumerate(used) if i in some), at.spare)
        first = [place(i) for i in range(count)]
        self.own = [[i for i in range(count) if first[i] == k] for k in range(len(used))]
        begins = {
            k: min(first[i] for i in some if first[i] < k)
            for k, some in enumerate(used) if any(first[i] < k for i in some)
        }  # fmt: skip
        # carried[j]: the layers whose e is part of the state that goes into phase j
        self._carried = [
            [k for k, begin in begins.items() if begin < j <= k] for j in range(len(used))
        ]
        self._late = {k: [i for i in used[k] if first[i] < k] for k in begins}
        ends = list(itertools.accumulate(self._sizes, initial=0))
        device = layers[0].A.device
        self.controls = [
            torch.cat([torch.arange(*ends[i : i + 2], device=device) for i in some]) if some
            else torch.arange(0, device=device)
            for some in self.own
        ]  # fmt: skip

    def sizes(self, A: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        """Return the numbers of states and of controls of every phase."""
        return [X.shape[-1] for X in A], [len(index) for index in self.controls]

    def state_matrices(self) -> list[Tensor]:
        """Return A of every phase."""
        return [self._state_matrix(j) for j in range(len(self.own))]

    def _state_matrix(self, j: int) -> Tensor:
        layer = self._layers[max(j, 1) - 1]
        eye = lambda n: torch.eye(n, dtype=layer.A.dtype, device=layer.A.device)
        n, carried = layer.A.shape[-1], self._carried[j]
        rows, columns = self._rows(j), _places(n, carried, self._widths)
        A = layer.A.new_zeros(len(layer.A), _end(rows), _end(columns))
        A[:, rows[None], columns[None]] = eye(n) if j == 0 else layer.A
        for k in carried:
            A[:, rows.get(k, rows[None]), columns[k]] = eye(self._widths[k])
        return A

    def _rows(self, j: int) -> dict[int | None, slice]:
        """Return where the state and what is carried stand after phase j."""
        A = self._layers[max(j, 1) - 1].A
        on = self._carried[j + 1] if j + 1 < len(self._carried) else []
        return _places(A.shape[-1 if j == 0 else -2], on, self._widths)

    def _effects(self, j: int) -> list[tuple[slice, int]]:
        """Return which rows of phase j's B are the derivatives of which layer."""
        rows = self._rows(j)
        return [(where, j if k is None else k) for k, where in rows.items() if k or j]

    def input_matrices(self, A: Sequence[Tensor]) -> list[Tensor]:
        """Return B of every phase."""
        found = []
        for j, A_j in enumerate(A):
            B = A_j.new_zeros(*A_j.shape[:2], len(self.controls[j]))
            for where, k in self._effects(j):
                B[:, where] = self._layers[k - 1].by(self.own[j], self._sizes)
            found.append(B)
        return found

    def products(self, j: int, minibatch: Minibatch, like: Tensor) -> InputMap:
        """Return B of phase j by its products, in the type of `like` (*batch, n+, n)."""
        parts = [
            (where, _LayerProducts(self._at, k, self.own[j], minibatch))
            for where, k in self._effects(j)
            if set(self.own[j]) & set(self._at.used[k])
        ]
        m, exact = len(self.controls[j]), minibatch == "exact"
        batch, rows = len(self._layers[0].A), _end(self._rows(j))

        def push(v: Tensor) -> Tensor:
            out = v.new_zeros(batch, rows, v.shape[-1])
            for where, part in parts:
                out[:, where] = part.push(v)
            return out.flatten(0, 1) if exact else out

        def pull(w: Tensor) -> Tensor:
            w = w.reshape(batch, rows, w.shape[-1])
            out = w.new_zeros(*(() if exact else (batch,)), m, w.shape[-1])
            for where, part in parts:
                out = out + part.pull(w[:, where])
            return out

        return ProductMap(m, push, pull, like)

    def require_single_use(self) -> None:
        """Refuse a parameter that acts in several phases.

        Raises:
            ValueError: If there is one.
        """
        for k, some in self._late.items():
            names = ", ".join(self._names[i] for i in some)
            raise ValueError(
                f"parameters that act in several phases ({names}, again in phase {k}) have no "
                "Newton problem layer by layer: let the phases hand on what the parameters make, "
                "as ConvBlock.phases does, or take route 'krylov' (or 'dare', with one DEQ layer)."
            )


class _LayerProducts:
    """Products with a layer's derivative in some parameters, of all samples."""

    def __init__(self, at: Layers, k: int, parameters: Sequence[int], minibatch: Minibatch) -> None:
        part, used = at.controls.part(parameters), at.used[k]
        kept = [i for i in parameters if i in used]
        entries = zip(parameters, torch.arange(part.m).split(part.sizes), strict=True)
        self._m = part.m
        index = torch.cat([index for i, index in entries if i in kept])
        self._index = index.to(at.x.device)
        self._u = at.controls.part(kept).vector
        self._local, self._at, self._k = at.local(k, kept), at, k
        self._exact = minibatch == "exact"

    def push(self, v: Tensor) -> Tensor:
        """Return B v `(batch, n+, j)` for v `(m, j)`, or `(batch, m, j)` for one each."""
        states, x = self._at.states(self._k), self._at.x
        kept = v[..., self._index, :].to(states.dtype)

        def one(s: Tensor, x: Tensor, direction: Tensor) -> Tensor:
            return jvp(lambda u: self._local(u, s, x), (self._u,), (direction,))[1]

        own = None if self._exact else 0
        samples = torch.vmap(one, (0, 0, own))
        # Parameters that are not in u leave their graph.
        return torch.vmap(lambda d: samples(states, x, d), -1, -1)(kept).to(v.dtype).detach()

    def pull(self, w: Tensor) -> Tensor:
        """Return B'w `(m, j)`, or `(batch, m, j)`, for w `(batch, n+, j)`."""
        states, x = self._at.states(self._k), self._at.x

        def one(s: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
            return vjp(lambda u: self._local(u, s, x), self._u)[1](cotangent)[0]

        samples = torch.vmap(one)
        total = lambda c: samples(states, x, c).sum(0) if self._exact else samples(states, x, c)
        pulled = torch.vmap(total, -1, -1)(w.to(states.dtype)).to(w.dtype)
        out = w.new_zeros(*pulled.shape[:-2], self._m, w.shape[-1])
        return out.index_copy_(-2, self._index, pulled.detach())


def _places(n: int, carried: Sequence[int], width: dict[int, int]) -> dict[int | None, slice]:
    """Return where the state (None) and what is carried stand."""
    places: dict[int | None, slice] = {None: slice(0, n)}
    end = n
    for k in carried:
        places[k] = slice(end, end + width[k])
        end += width[k]
    return places


def _end(places: dict[int | None, slice]) -> int:
    return max(place.stop for place in places.values())
