"""Parts of a module whose weights are kept elsewhere: they work in it, and are no part of what it saves or loads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def kept_elsewhere(module: nn.Module, name: str) -> None:
    """The submodule `name` is neither in the module's state dict nor asked for by `load_state_dict`."""

    def leave_out(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}{name}.")]:
            del state[key]

    def bring_along(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
        own = module.get_submodule(name).state_dict(keep_vars=True)
        state.update({f"{prefix}{name}.{key}": value for key, value in own.items()})

    module.register_state_dict_post_hook(leave_out)
    module.register_load_state_dict_pre_hook(bring_along)
