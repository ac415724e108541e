"""Files that others wrote: JSON objects and files of tensors. Nothing beyond tensors is ever unpickled."""

import io
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline import storage
from pipeline.errors import UserError, first_line

__all__ = ["Tensors", "load", "read_object", "read_tensors", "state_dict"]

Tensors = dict[str, Tensor]

# float64 would lose bits, integers are no weights.
_WIDENED = (torch.float32, torch.float16, torch.bfloat16)


def read_object(location: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: No such file, or something else.
    """
    try:
        found = json.loads(_read(location))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} is no JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{location} holds a {type(found).__name__}; give a JSON object")
    return found


def read_tensors(location: str) -> Tensors:
    """Reads a state dict. Raises as ``load`` and ``state_dict``."""
    return state_dict(load(location), location)


def load(location: str) -> Any:
    """What a file holds: safetensors, or a file of ``torch.save`` with nothing but tensors (``weights_only``).

    Raises:
        UserError: No such file, or another format.
    """
    data = _read(location)
    return _torch_load(data, location) if _is_torch_file(data) else _safetensors_load(data, location)


def state_dict(found: Any, location: str) -> Tensors:
    """Tensors by name, float32, without the ``module.`` that data parallelism puts before the names.

    Raises:
        UserError: Other things than tensors by name, or a dtype that is not float32, float16 or bfloat16.
    """
    if not _is_state_dict(found):
        held = f"{type(found).__name__} of {len(found)}" if hasattr(found, "__len__") else type(found).__name__
        raise UserError(f"{location} holds a {held}; give a state dict: tensors by name, and nothing else")
    return {name.removeprefix("module."): _widened(value, name, location) for name, value in found.items()}


def _is_state_dict(found: Any) -> bool:
    return isinstance(found, Mapping) and all(
        isinstance(name, str) and name.isprintable() and isinstance(value, Tensor) for name, value in found.items()
    )


def _read(location: str) -> bytes:
    try:
        return storage.read_bytes(location)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{location} is no file; give one that is there") from error


def _is_torch_file(data: bytes) -> bool:
    # A zip, or the pickle that torch wrote before 1.6. A safetensors file begins with the size of its header.
    return data.startswith((b"PK", b"\x80"))


def _torch_load(data: bytes, location: str) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file ends in whatever its bytes happen to call
        raise UserError(
            f"{location} is no file of torch.save that holds tensors alone; save the state dict itself, or give "
            "safetensors (programs in pickles are never run)"
        ) from error


def _safetensors_load(data: bytes, location: str) -> Tensors:
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # SafetensorError, and what torch says to sizes and names that a header may claim
        why = first_line(error)
        raise UserError(f"{location} is neither a safetensors file nor one of torch.save: {why}") from error


def _widened(tensor: Tensor, name: str, location: str) -> Tensor:
    if tensor.dtype not in _WIDENED:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _WIDENED)
        raise UserError(f"{location}: {name} is {str(tensor.dtype).removeprefix('torch.')}; give {allowed}")
    # Strides of zero let a few bytes stand for a tensor that no memory holds.
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not is_dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{location} is damaged or packed in a rare way: {name} has not all its values; save it again")
    return tensor.detach().float()
