"""``UNet2DModel``'s config and ours. It can be many networks; ours is one of them, the DDPM paper's."""

from collections.abc import Mapping
from typing import Any

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.interop.names import group_counts

__all__ = ["our_model", "their_unet"]

# What a field means where a config leaves it out, and what our network is. Only fields that change the network.
_OURS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "center_input_sample": (False, (False,)),
    "time_embedding_type": ("positional", ("positional",)),
    "freq_shift": (0, (1,)),
    "flip_sin_to_cos": (True, (False,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "mid_block_scale_factor": (1, (1,)),
    "downsample_padding": (1, (0,)),
    "downsample_type": ("conv", ("conv",)),
    "upsample_type": ("conv", ("conv",)),
    "act_fn": ("silu", ("silu", "swish")),
    "norm_eps": (1e-5, (1e-6,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "add_attention": (True, (True,)),
    "class_embed_type": (None, (None,)),
    "num_class_embeds": (None, (None,)),
}
_DOWN, _UP = ("DownBlock2D", "AttnDownBlock2D"), ("UpBlock2D", "AttnUpBlock2D")
_MOST_CHANNELS, _MOST_LAYERS, _MOST_PIXELS = 2**16, 100, 2**16
# Read below, or without meaning for the network.
_READ = {"sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels"}
_READ |= {"layers_per_block", "dropout", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups"}
_READ |= {"time_embedding_dim", "num_train_timesteps"}


def our_model(config: Mapping[str, Any], *, where: str, image_size: int | None = None) -> ModelConfig:
    """The network that a ``UNet2DModel`` config describes.

    Args:
        config: The content of its ``config.json``.
        where: What messages call it.
        image_size: Height and width where the config names none, pixels.

    Raises:
        UserError: It describes a network that ours cannot be; every field that differs is named.
    """
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UserError(f"{where}: _class_name is {config['_class_name']!r}; only a UNet2DModel can be our network")
    try:
        misfits = _misfits(given)
        model = _model(given, _size(given.get("sample_size"), image_size, misfits, where), misfits)
    except UserError as error:
        raise error if where in str(error) else UserError(f"{where}: {error}") from error
    except Exception as error:  # whatever JSON can hold in the place of numbers and words
        raise UserError(f"{where} is no config of a UNet2DModel: {error!r}") from error
    if misfits:
        raise UserError(f"{where} is another network than ours, the DDPM paper's: {'; '.join(misfits)}")
    return model


def their_unet(model: ModelConfig) -> dict[str, Any]:
    """The ``UNet2DModel`` config of our network.

    Raises:
        UserError: It has classes, or normalisation layers with several numbers of groups, as no ``DDPMPipeline`` has.
    """
    if model.num_classes:
        raise UserError(
            f"num_classes is {model.num_classes}: a DDPMPipeline tells its network no classes; 0 is allowed"
        )
    groups = group_counts(model)
    if len(groups) > 1:
        raise UserError(
            f"base_channels {model.base_channels}: normalisation layers have {sorted(groups)} groups and a UNet2DModel "
            "has one number for all; networks of 64 base channels or more can be exported"
        )
    levels = range(len(model.channel_mult))
    attends = [model.image_size // 2**level in model.attention_resolutions for level in levels]
    fields = {name: allowed[0] for name, (_, allowed) in _OURS.items() if allowed[0] is not None}
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.35.0",
        "sample_size": model.image_size,
        "in_channels": model.image_channels,
        "out_channels": model.image_channels,
        "block_out_channels": [model.base_channels * mult for mult in model.channel_mult],
        "layers_per_block": model.num_res_blocks,
        "down_block_types": [_DOWN[attention] for attention in attends],
        "up_block_types": [_UP[attention] for attention in reversed(attends)],
        "dropout": model.dropout,
        "attention_head_dim": None,
        "norm_num_groups": groups.pop(),
        **fields,
    }


def _misfits(given: Mapping[str, Any]) -> list[str]:
    misfits = [f"{name} is not known" for name in given if name not in _OURS and name not in _READ]
    for name, (default, allowed) in _OURS.items():
        value = given.get(name, default)
        if value not in allowed:
            misfits.append(f"{name} is {value!r}, ours {' or '.join(map(repr, allowed))}")
    return misfits


def _model(given: Mapping[str, Any], size: int, misfits: list[str]) -> ModelConfig:
    widths = [_whole(given, "block_out_channels", width, _MOST_CHANNELS) for width in given["block_out_channels"]]
    base = widths[0]
    if any(width % base for width in widths):
        misfits.append(f"block_out_channels is {widths}, ours are multiples of the first")
    if given.get("time_embedding_dim") not in (None, 4 * base):
        misfits.append(f"time_embedding_dim is {given['time_embedding_dim']}, ours {4 * base}")
    channels, out = given.get("in_channels", 3), given.get("out_channels", 3)
    if channels != out or channels not in (1, 3):
        misfits.append(f"in_channels is {channels} and out_channels {out}, ours both 1 or both 3")
    attends = _attention(given, misfits)
    head = given.get("attention_head_dim", 8)
    alone = {widths[-1]} | {width for width, attention in zip(widths, attends, strict=False) if attention}
    if head is not None and alone != {head}:
        misfits.append(f"attention_head_dim is {head}, ours one head of all channels (null)")
    if not 0 <= (dropout := given.get("dropout", 0.0)) < 1:
        raise UserError(f"dropout is {dropout}; allowed is a number in [0, 1)")
    model = ModelConfig(
        image_size=size,
        image_channels=channels if channels in (1, 3) else 3,
        base_channels=base,
        channel_mult=tuple(width // base for width in widths),
        num_res_blocks=_whole(given, "layers_per_block", given.get("layers_per_block", 2), _MOST_LAYERS),
        attention_resolutions=tuple(size // 2**level for level, attention in enumerate(attends) if attention),
        dropout=float(dropout),
    )
    if not misfits:
        _check_groups(given, model, misfits)
    return model


def _whole(given: Mapping[str, Any], field: str, value: Any, most: int) -> int:
    """A size; beyond ``most`` even the shapes of a network would take for ever."""
    if not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(f"{field} is {str(given.get(field))[:40]}; allowed are whole numbers in 1..{most}")
    return value


def _size(sample_size: Any, image_size: int | None, misfits: list[str], where: str) -> int:
    sides = set(sample_size) if isinstance(sample_size, list) else {sample_size}
    if len(sides) > 1:
        misfits.append(f"sample_size is {sample_size}, ours is square")
    found = image_size if sides == {None} else sides.pop()
    if found is None:
        raise UserError(f"{where} names no sample_size; give --image-size")
    found = _whole({"sample_size": sample_size}, "sample_size", found, _MOST_PIXELS)
    if image_size is not None and image_size != found:
        raise UserError(f"--image-size {image_size}: {where} says sample_size {found}; leave the flag out")
    return found


def _attention(given: Mapping[str, Any], misfits: list[str]) -> list[bool]:
    """Whether each level attends, the finest first."""
    down, up = list(given["down_block_types"]), list(given["up_block_types"])
    if foreign := sorted((set(down) - set(_DOWN)) | (set(up) - set(_UP))):
        misfits.append(f"down_block_types and up_block_types have {', '.join(foreign)}, ours {', '.join(_DOWN + _UP)}")
    attends = [name == _DOWN[1] for name in down]
    if [name == _UP[1] for name in reversed(up)] != attends:
        misfits.append(f"up_block_types is {up}, ours attends where down_block_types does ({down})")
    return attends


def _check_groups(given: Mapping[str, Any], model: ModelConfig, misfits: list[str]) -> None:
    groups, ours = given.get("norm_num_groups", 32), group_counts(model)
    if ours != {groups}:
        misfits.append(f"norm_num_groups is {groups}, ours for these widths {' and '.join(map(str, sorted(ours)))}")
    if given.get("attn_norm_num_groups") not in (None, groups):
        misfits.append(f"attn_norm_num_groups is {given['attn_norm_num_groups']}, ours {groups}")
