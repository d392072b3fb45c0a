"""What hooks of `accelerate` do to a model, on one CPU: weights that wait elsewhere, layers on several devices."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from stagdist.hf.layers_stagformer import StagFormerCache

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
"""Names of two devices that need not exist: see `Devices`."""


def moved(value: Any, device: torch.device, skipped: list[str]) -> Any:
    """An argument with all its tensors on the device.

    Raises:
        AssertionError: the argument is, or contains, something else than tensors, numbers and containers of them. The
            cache is one, if its name is not in `skipped`.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: item if key in skipped else moved(item, device, skipped) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device, skipped) for item in value)
    assert value is None or isinstance(value, bool | int | float | str), f"a hook cannot move a {type(value).__name__}"
    return value


def _move_arguments(
    device: torch.device, skipped: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    assert all(isinstance(kwargs[key], StagFormerCache | None) for key in skipped if key in kwargs)
    return moved(args, device, skipped), moved(kwargs, device, skipped)


def offload(model: Any) -> None:
    """Keep the weights on the meta device except while the module that owns them runs.

    The embedding stays, so that `generate` finds the model's device.
    """
    for module in model.modules():
        if module is model.get_input_embeddings():
            continue
        stored = {name: value.detach().clone() for name, value in module.named_parameters(recurse=False)}
        module.register_forward_pre_hook(partial(_load, stored), with_kwargs=True)
        move = partial(_move_arguments, torch.device("cpu"), model._skip_keys_device_placement)
        module.register_forward_pre_hook(move, with_kwargs=True)
        module.register_forward_hook(partial(_unload, stored))
        _unload(stored, module)


def _load(stored: dict[str, Tensor], module: nn.Module, args: object, kwargs: object) -> None:
    for name, value in stored.items():
        module.register_parameter(name, nn.Parameter(value))


def _unload(stored: dict[str, Tensor], module: nn.Module, *_: object) -> None:
    for name, value in stored.items():
        module.register_parameter(name, nn.Parameter(value.to("meta")))


def spread(model: Any, devices: dict[str, torch.device]) -> None:
    """Put modules and parameters, by name, on devices of `Devices`. A module that contains others moves arguments only
    if it is named itself, or lies in one that is."""
    for name, parameter in model.named_parameters():
        parameter.device_name = _place(name, devices)
    for name, module in model.named_modules():
        device = FIRST if module is model else _place(name, devices)
        if device is not None:
            move = partial(_move_arguments, device, model._skip_keys_device_placement)
            module.register_forward_pre_hook(move, with_kwargs=True)
    model.register_forward_hook(lambda module, args, output: type(output)(_back(output)))


def _back(output: Mapping[str, Any]) -> dict[str, Any]:
    skipped = [key for key, value in output.items() if isinstance(value, StagFormerCache)]
    back: dict[str, Any] = moved(output, FIRST, skipped)
    return back


def _place(name: str, devices: dict[str, torch.device]) -> torch.device | None:
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((devices[prefix] for prefix in prefixes if prefix in devices), None)


class Devices(TorchFunctionMode):
    """Every tensor has a device in name only; an operation on tensors of two devices raises an error, as with GPUs.

    Numbers are computed on the CPU, so results can be compared. A tensor made without a device is on the CPU. Tensors
    of one number go with all others.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return _device(args[0])
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found = {_device(tensor) for tensor in tensors if tensor.dim()} or {_device(tensor) for tensor in tensors}
        assert len(found) <= 1, f"{getattr(func, '__name__', func)} has tensors on {found}"
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = "cpu"
        elif found:
            device = found.pop()
        return pytree.tree_map_only(Tensor, partial(_on, device), func(*args, **kwargs))

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wanted = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device | str)]
        dtype = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        device = torch.device(wanted[0]) if wanted else _device(tensor)
        if device == _device(tensor) and dtype in ([], [tensor.dtype]):
            return tensor
        return _on(device, tensor.to(dtype[0] if dtype else tensor.dtype, copy=True))


def _device(tensor: Tensor) -> torch.device:
    device: torch.device = getattr(tensor, "device_name", None) or torch.device("cpu")
    return device


def _on(device: torch.device | str | None, tensor: Tensor) -> Tensor:
    if device is not None:
        tensor.device_name = torch.device(device)  # type: ignore[attr-defined]
    return tensor
