"""State dicts of the DDPM paper's network as PyTorch codes save it: weights by name, and no config.

The widths follow from the shapes. The size of the images does not, and decides where the network attends.
"""

import re

from pipeline.config import ModelConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.interop.foreign_files import Tensors, read_tensors
from pipeline.interop.names import group_counts, our_tensors, pesser_name

__all__ = ["read_state_dict"]

_OURS = "the DDPM paper's network as pesser/pytorch_diffusion and ermongroup/ddim save it"


def read_state_dict(location: str, *, image_size: int | None) -> tuple[TrainConfig, Tensors]:
    """Reads a network; its schedule is taken for the paper's (linear, T = 1000, fixed-small).

    Args:
        location: safetensors or a file of ``torch.save``: a path or an ``s3://`` URI.
        image_size: Height and width of its images, pixels.

    Returns:
        A config with the model and defaults elsewhere, and the weights by our names.

    Raises:
        UserError: It is another network, or ``image_size`` is missing.
    """
    tensors = read_tensors(location)
    if "time_embed.0.weight" in tensors and "input_blocks.0.0.weight" in tensors:
        raise UserError(_why_not_openai(tensors, location))
    if "temb.dense.0.weight" not in tensors:
        first = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise UserError(f"{location} is no network that is known here (it has {first}, ...); allowed is {_OURS}")
    if image_size is None:
        raise UserError(f"{location}: weights do not tell the size of the images; give --image-size, for example 32")
    try:
        model = _model(tensors, image_size)
    except (KeyError, IndexError) as error:
        raise UserError(f"{location} has no {error.args[0]}; allowed is {_OURS}, whole") from error
    if tensors["conv_out.weight"].shape[0] != model.image_channels:
        out = tensors["conv_out.weight"].shape[0]
        found = f"conv_out gives {out} channels of {model.image_channels} (a learned variance)"
        raise UserError(f"{location}: {found}; our network predicts the noise alone")
    if group_counts(model) != {32}:
        raise UserError(f"{location}: {model.base_channels} base channels; with 32 groups they must be 64 or more")
    levels = len(model.channel_mult)
    return TrainConfig(model=model), our_tensors(tensors, model, pesser_name(levels), where=location)


def _model(tensors: Tensors, image_size: int) -> ModelConfig:
    levels = 1 + max(_numbers(tensors, r"down\.(\d+)\.block\."))
    base, channels = tensors["conv_in.weight"].shape[:2]
    widths = [tensors[f"down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    attends = _numbers(tensors, r"down\.(\d+)\.attn\.")
    return ModelConfig(
        image_size=image_size,
        image_channels=channels,
        base_channels=base,
        channel_mult=tuple(width // base for width in widths),
        num_res_blocks=1 + max(_numbers(tensors, r"down\.0\.block\.(\d+)\.")),
        attention_resolutions=tuple(image_size // 2**level for level in sorted(attends)),
    )


def _numbers(tensors: Tensors, pattern: str) -> set[int]:
    return {int(found[1]) for name in tensors if (found := re.match(pattern, name))}


def _why_not_openai(tensors: Tensors, location: str) -> str:
    """What tells the network of improved-diffusion and guided-diffusion from ours, found and always."""
    out, channels = tensors["out.2.weight"].shape[0], tensors["input_blocks.0.0.weight"].shape[1]
    found = [f"{out} output channels of {channels} (a learned variance)"] if out != channels else []
    emb = next((name for name in sorted(tensors) if name.endswith(".emb_layers.1.weight")), None)
    if emb and tensors[emb].shape[0] == 2 * tensors[emb.replace("emb_layers.1", "out_layers.0")].shape[0]:
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
