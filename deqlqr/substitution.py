"""A module called with other values of its parameters and buffers, wherever it uses them."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class Substitution:
    """Calls a module with other tensors in place of its own, and leaves it as it was.

    A tensor of several modules is replaced in all of them, and a module that stands in several
    places is looked at once: `torch.func.functional_call` by itself leaves such a module with the
    values (pytorch issue 164759).

    Args:
        module: The module.
        named: Its parameters and buffers that are to be replaced, by name.
    """

    def __init__(self, module: nn.Module, named: Mapping[str, Tensor]) -> None:
        self.module = module
        names = {id(tensor): name for name, tensor in named.items()}
        self._places = {
            place: names[id(tensor)] for place, tensor in _places(module) if id(tensor) in names
        }

    def __call__(
        self, values: Mapping[str, Tensor], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        """Call the module.

        Args:
            values: What stands in for each tensor, by its name.
            args: What the module takes.
            keywords: Its keywords.

        Returns:
            What the module returns.
        """
        given = {place: values[name] for place, name in self._places.items()}
        return functional_call(self.module, given, args, keywords, tie_weights=False)


def called_with(module: nn.Module, values: Mapping[str, Tensor], *args: Any) -> Any:
    """Call a module once with other values of some parameters."""
    own = dict(module.named_parameters())
    named = {name: own[name] for name in values}
    return Substitution(module, named)(values, args, {})


def _places(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return every place of a parameter or buffer, of each module once."""
    for prefix, part in module.named_modules():
        # In a `DataParallel` replica parameters are plain attributes.
        former = getattr(part, "_former_parameters", {})
        for members in (part._parameters, part._buffers, former):
            for name, tensor in members.items():
                if tensor is not None:
                    yield (f"{prefix}.{name}" if prefix else name), tensor
