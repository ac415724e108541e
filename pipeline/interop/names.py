"""The weights of one network under the names that three codes give them.

All three hold the DDPM paper's UNet. Where they differ but for the names: q, k and v are one 1x1 convolution here and
three layers elsewhere, and diffusers has linear layers in the place of 1x1 convolutions of attention.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.interop.foreign_files import Tensors
from pipeline.model_folder import build_unet

__all__ = ["NameOf", "diffusers_name", "group_counts", "our_tensors", "pesser_name", "shapes_of", "their_tensors"]

NameOf = Callable[[str], str]
"""Our name of a weight -> theirs, with ``{qkv}`` where they have three layers."""

_DIFFUSERS = (
    (r"^time_embedding\.dense(\d)", r"time_embedding.linear_\1"),
    (r"^norm_out", "conv_norm_out"),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.res\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.attention\.", r"\1_blocks.\2.attentions.\3."),
    (r"^(down|up)\.(\d+)\.resample\.", r"\1_blocks.\2.\1samplers.0."),
    (r"^mid\.(\d)\.res\.", r"mid_block.resnets.\1."),
    (r"^mid\.0\.attention\.", "mid_block.attentions.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"\.proj_out\.", ".to_out.0."),
    (r"\.qkv\.", ".to_{qkv}."),
    (r"\.time_proj\.", ".time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."),
)
_PESSER = (
    (r"^time_embedding\.dense1\.", "temb.dense.0."),
    (r"^time_embedding\.dense2\.", "temb.dense.1."),
    (r"\.blocks\.(\d+)\.res\.", r".block.\1."),
    (r"\.blocks\.(\d+)\.attention\.", r".attn.\1."),
    (r"^down\.(\d+)\.resample\.", r"down.\1.downsample."),
    (r"^up\.(\d+)\.resample\.", r"up.\1.upsample."),
    (r"^mid\.0\.res\.", "mid.block_1."),
    (r"^mid\.1\.res\.", "mid.block_2."),
    (r"^mid\.0\.attention\.", "mid.attn_1."),
    (r"\.qkv\.", ".{qkv}."),
    (r"\.time_proj\.", ".temb_proj."),
    (r"\.shortcut\.", ".nin_shortcut."),
)


def diffusers_name(name: str) -> str:
    """In ``UNet2DModel``."""
    return _renamed(name, _DIFFUSERS)


def pesser_name(levels: int) -> NameOf:
    """In pesser/pytorch_diffusion and ermongroup/ddim, which count the levels of the way up from the finest."""

    def name_of(name: str) -> str:
        flipped = re.sub(r"^up\.(\d+)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", name)
        return _renamed(flipped, _PESSER)

    return name_of


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def shapes_of(model: ModelConfig) -> dict[str, torch.Size]:
    """Shapes of all weights by our names; builds nothing but shapes. Raises ``UserError`` for an impossible network."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build_unet(model).state_dict().items()}


def group_counts(model: ModelConfig) -> set[int]:
    """The numbers of groups that the normalisation layers have."""
    with torch.device("meta"):
        modules = list(build_unet(model).modules())
    return {module.num_groups for module in modules if isinstance(module, torch.nn.GroupNorm)}


def our_tensors(theirs: Mapping[str, Tensor], model: ModelConfig, name_of: NameOf, *, where: str) -> Tensors:
    """Their weights under our names, bit for bit.

    Args:
        theirs: All of them.
        model: The network that they belong to.
        name_of: Their names.
        where: What messages call them.

    Raises:
        UserError: A weight is missing, left over or of another shape; it is named.
    """
    ours, used = {}, set()
    for name, shape in shapes_of(model).items():
        names = _parts(name_of(name))
        missing = [each for each in names if each not in theirs]
        if missing:
            raise UserError(f"{where} has no {missing[0]}, which our network has as {name}; give the whole state dict")
        used.update(names)
        tensors = [theirs[each] for each in names]
        found, wanted = [tuple(tensor.shape) for tensor in tensors], (shape[0] // len(names), *shape[1:])
        if any(_trimmed(each) != _trimmed(wanted) for each in found):
            raise UserError(f"{where}: {names[0]} has the shape {list(found[0])}, our {name} takes {list(wanted)}")
        ours[name] = torch.cat([tensor.reshape(wanted) for tensor in tensors]).reshape(shape).contiguous()
    if left_over := sorted(theirs.keys() - used):
        raise UserError(f"{where} has {len(left_over)} weights that our network lacks: {', '.join(left_over[:3])}")
    return ours


def their_tensors(ours: Mapping[str, Tensor], name_of: NameOf, *, linear: str) -> Tensors:
    """The inverse of ``our_tensors``.

    Args:
        ours: Our weights by our names.
        name_of: Their names.
        linear: Regular expression of their names whose 1x1 convolution is a linear layer.
    """
    theirs = {}
    for name, tensor in ours.items():
        names = _parts(name_of(name))
        for each, part in zip(names, tensor.chunk(len(names)), strict=True):
            is_linear = part.ndim == 4 and re.search(linear, each) is not None
            theirs[each] = (part[:, :, 0, 0] if is_linear else part).contiguous()
    return theirs


def _parts(name: str) -> list[str]:
    return [name.format(qkv=part) for part in "qkv"] if "{qkv}" in name else [name]


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the 1x1 that tells a convolution from a linear layer."""
    return shape[:2] if shape[2:] == (1, 1) else shape
