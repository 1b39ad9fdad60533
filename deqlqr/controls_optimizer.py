"""A torch optimizer of a model's controls: options by group, vectors it remembers, counts."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deqlqr._checks import at_least
from deqlqr.controls import Controls
from deqlqr.direction import expanded


class ControlsOptimizer(torch.optim.Optimizer):
    """Base of optimizers that work on the vector of all trainable parameters.

    What belongs to all groups lives in the first, so that `state_dict` holds it.

    Args:
        model: The model.
        groups: Groups of parameters with their own options; all others form a last group.
        defaults: The options, and their values for groups that do not say.

    Attributes:
        model: The model.
        controls: Its trainable parameters.

    Raises:
        ValueError: If the groups hold anything else than parameters of the model and options.
    """

    def __init__(
        self, model: nn.Module, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]
    ) -> None:
        self.model, self.controls = model, Controls(model)
        super().__init__(self._grouped(groups, defaults), defaults)
        self.param_groups[0].update(step=0, damping_factor=1.0, counts={}, unchecked=None)

    def _grouped(
        self, groups: Iterable[dict[str, Any]], options: Iterable[str]
    ) -> list[dict[str, Any]]:
        """Return the user's groups, and one of all other parameters."""
        found = [{**group, "params": list(group["params"])} for group in groups]
        taken = {id(p) for group in found for p in group["params"]}
        known = {id(p) for p in self.model.parameters()}
        if not taken <= known:
            raise ValueError("param_groups must hold parameters of the model only.")
        rest = [p for p in self.controls.parameters if id(p) not in taken]
        for group in found:
            for name in group.keys() - {"params", *options}:
                raise ValueError(f"param_groups: no option {name!r} for a group.")
        return [*found, {"params": rest}] if rest else found

    @property
    def counts(self) -> dict[str, int]:
        """How many steps there were, and attempts rejected, steps rolled back and given up."""
        zeros = dict.fromkeys(("steps", "rejected", "rolled back", "given up"), 0)
        first = self.param_groups[0]
        return {**zeros, "steps": first["step"], **first["counts"]}

    def _count(self, event: str, times: int) -> None:
        if times:
            counts = self.param_groups[0]["counts"]
            counts[event] = counts.get(event, 0) + times

    def _keep_up_with_freezing(self) -> None:
        """Leave out parameters frozen since the last step, and take in those freed again."""
        now = [p for p in self.model.parameters() if p.requires_grad]
        if [id(p) for p in now] == [id(p) for p in self.controls.parameters]:
            return
        known = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) not in known for p in now):
            raise ValueError(
                "model has a trainable parameter that the optimizer was not given; call "
                "add_param_group."
            )
        self.controls = Controls(self.model)

    def _each(self, name: str, factor: float = 1.0) -> list[float]:
        """Return an option of the groups for each parameter, in the order of the controls."""
        strict = name == "damping"
        of = {
            id(p): at_least(name, group[name], 0.0, strict=strict) * factor
            for group in self.param_groups
            for p in group["params"]
        }
        return [of[id(p)] for p in self.controls.parameters]

    def _entries(self, name: str, like: Tensor) -> Tensor:
        """Return an option of the groups for each entry of u; a scalar where all agree."""
        values = self._each(name)
        if len(set(values)) == 1:
            return like.new_tensor(values[0])
        return expanded(values, self.controls.sizes, like)

    def _recall(self, what: str) -> Tensor | None:
        """Return a vector kept in `state`, so that it is saved, or `None`."""
        parts = [self.state[p].get(what) for p in self.controls.parameters]
        if any(part is None for part in parts):
            return None
        return torch.cat([part.reshape(-1) for part in parts if part is not None])

    def _remember(self, what: str, u: Tensor | None) -> None:
        named = {} if u is None else self.controls.unflatten(u)
        for name, p in zip(self.controls.names, self.controls.parameters, strict=True):
            if u is None:
                self.state[p].pop(what, None)
            else:
                self.state[p][what] = named[name].clone()
