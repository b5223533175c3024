"""What FSDP2 puts in the place of its sharded parameters while a module runs: whole tensors, always the same ones."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from cwfast._shards import fsdp_modules, is_sharded
from cwfast.errors import UnsupportedLayer


class StandIns:
    """Finds them at the first forward pass of each module that ``fully_shard`` was given, after FSDP2's own hook.

    Args:
        model: whose modules are watched.
        parameters: the sharded ones that are scored.
        found: called with the name of a parameter and the tensor that stands for it.

    Raises:
        UnsupportedLayer: (in a forward pass) a parameter is sharded by something else too (tensor parallelism).
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], found: Callable[[str, Tensor], None]
    ) -> None:
        self._found, self._parameters = found, parameters
        self._modules = fsdp_modules(model)
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._places = [
            (module, key, names[id(parameter)])
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if id(parameter) in names
        ]
        self.adopted: dict[str, Tensor] = {}

    def watch(self) -> list[Callable[[], object]]:
        """Begin to watch; what ends it is returned."""
        hooks = [module.register_forward_pre_hook(lambda *_: self._look()) for module in self._modules]
        hooks += [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._check(name))
            for name, parameter in self._parameters.items()
        ]
        return [hook.remove for hook in hooks]

    def _look(self) -> None:
        left = []
        for module, key, name in self._places:
            now = module._parameters[key]
            if now is None or now is self._parameters[name]:
                left.append((module, key, name))
            elif is_sharded(now):
                raise _otherwise(name, self._parameters[name])
            elif name not in self.adopted:
                self.adopted[name] = now
                self._found(name, now)
        self._places = left

    def _check(self, name: str) -> None:
        """A gradient came without that the parameter was seen: no score would be a silent skip."""
        if name not in self.adopted:
            raise UnsupportedLayer(
                f"parameter {name!r} must be used in the forward pass of a module that fully_shard was given; its "
                "gradient came from elsewhere (register_fsdp_forward_method)"
            )


def _otherwise(name: str, parameter: nn.Parameter) -> UnsupportedLayer:
    placements, mesh = parameter.placements, parameter.device_mesh  # type: ignore[attr-defined]
    return UnsupportedLayer(
        f"parameters that fully_shard was given must be sharded by nothing else; {name!r} has {placements} on {mesh} "
        "(tensor parallelism). Exclude it (exclude=[...]), or score by granularity='batch'"
    )
