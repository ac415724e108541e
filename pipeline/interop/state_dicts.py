"""State dicts of the DDPM paper's network as PyTorch codes save it: weights by name, and no config.

The widths follow from the shapes. The size of the images does not, and decides where the network attends.
"""

import re
from dataclasses import replace
from typing import Any

from pipeline.config import ModelConfig, RecipeConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.interop.foreign_files import Tensors, load, state_dict
from pipeline.interop.names import group_counts, our_tensors, pesser_name
from pipeline.interop.recipe import Imported, complete

__all__ = ["read_state_dict"]

_NOTHING = RecipeConfig()
_OURS = "the DDPM paper's network as pesser/pytorch_diffusion and ermongroup/ddim save it"


def read_state_dict(location: str, *, image_size: int | None, given: RecipeConfig = _NOTHING) -> Imported:
    """Reads a network; its schedule and sampling are taken for the paper's unless ``given``.

    Args:
        location: safetensors or a file of ``torch.save``: a path or an ``s3://`` URI.
        image_size: Height and width of its images, pixels.
        given: What is known of schedule and sampling.

    Raises:
        UserError: It is another network, or ``image_size`` is missing.
    """
    found, notes = _chosen(load(location))
    tensors = state_dict(found, location)
    if "time_embed.0.weight" in tensors and "input_blocks.0.0.weight" in tensors:
        raise UserError(_why_not_openai(tensors, location))
    if "temb.dense.0.weight" not in tensors:
        first = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise UserError(f"{location} is no network that is known here (it has {first}, ...); allowed is {_OURS}")
    if image_size is None:
        raise UserError(f"{location}: weights do not tell the size of the images; give --image-size, for example 32")
    try:
        model = _model(tensors, image_size)
        if (out := _shape(tensors, "conv_out.weight")[0]) != model.image_channels:
            found = f"conv_out gives {out} channels of {model.image_channels} (a learned variance)"
            raise UserError(f"{found}; our network predicts the noise alone")
        if group_counts(model) != {32}:
            raise UserError(f"{model.base_channels} base channels; with 32 groups they must be 64 or more")
    except UserError as error:
        raise UserError(f"{location}: {error}") from error
    made = complete({}, given, TrainConfig(model=model), location)
    ours = our_tensors(tensors, model, pesser_name(len(model.channel_mult)), where=location)
    return replace(made, tensors=ours, notes=made.notes + notes)


def _chosen(found: Any) -> tuple[Any, tuple[str, ...]]:
    """Of what ermongroup/ddim saves while it trains, [model, optimizer, epoch, step] and perhaps the EMA, the last."""
    if not (isinstance(found, list) and len(found) in (4, 5) and isinstance(found[3], int)):
        return found, ()
    what = "its EMA, the fifth entry" if len(found) == 5 else "its last weights, the first entry: it has no EMA"
    return found[4 if len(found) == 5 else 0], (f"read {what} of a checkpoint of step {found[3]:,}",)


def _model(tensors: Tensors, image_size: int) -> ModelConfig:
    levels = _count(tensors, r"down\.(\d+)\.block\.", "down.0.block.0")
    base, channels = _shape(tensors, "conv_in.weight")[:2]
    if channels not in (1, 3):
        raise UserError(f"conv_in takes images of {channels} channels; allowed are 1 (grey) and 3 (RGB)")
    widths = [_shape(tensors, f"down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    attends = {int(found[1]) for name in tensors if (found := re.match(r"down\.(\d{1,4})\.attn\.", name))}
    return ModelConfig(
        image_size=image_size,
        image_channels=channels,
        base_channels=base,
        channel_mult=tuple(width // base for width in widths),
        num_res_blocks=_count(tensors, r"down\.0\.block\.(\d+)\.", "down.0.block.0"),
        attention_resolutions=tuple(image_size // 2**level for level in sorted(attends) if level < levels),
    )


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    """Of a convolution, which must be there and hold something."""
    if name not in tensors:
        raise UserError(f"it has no {name}; allowed is {_OURS}, whole")
    shape = tuple(tensors[name].shape)
    if len(shape) != 4 or 0 in shape:
        raise UserError(f"{name} has the shape {list(shape)}; allowed is that of a convolution, four sizes from 1 on")
    return shape


def _count(tensors: Tensors, pattern: str, first: str) -> int:
    """How many numbers from 0 on the pattern finds."""
    found = {match[1] for name in tensors if (match := re.match(pattern, name))}
    if not found:
        raise UserError(f"it has no {first}; allowed is {_OURS}, whole")
    return next(count for count in range(len(found) + 1) if str(count) not in found) or 1


def _why_not_openai(tensors: Tensors, location: str) -> str:
    """What tells the network of improved-diffusion and guided-diffusion from ours, found and always."""
    out, channels = _size(tensors, "out.2.weight", 0), _size(tensors, "input_blocks.0.0.weight", 1)
    found = [f"{out} output channels of {channels} (a learned variance)"] if out not in (None, channels) else []
    emb = next((name for name in sorted(tensors) if name.endswith(".emb_layers.1.weight")), "")
    normed = _size(tensors, emb.replace("emb_layers.1", "out_layers.0"), 0)
    if normed is not None and _size(tensors, emb, 0) == 2 * normed:
        found.append("scale-shift norms (use_scale_shift_norm)")
    if "label_emb.weight" in tensors:
        found.append("classes (label_emb)")
    found.append(
        "cosines before sines at frequencies i / half of t, normalisation eps 1e-5, downsampling padded all round"
    )
    return (
        f"{location} is a network of improved-diffusion or guided-diffusion, which is another network than ours: "
        f"{'; '.join(found)}; allowed is {_OURS}"
    )


def _size(tensors: Tensors, name: str, axis: int) -> int | None:
    shape = tensors[name].shape if name in tensors else ()
    return shape[axis] if axis < len(shape) else None
