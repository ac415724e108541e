"""Our weights under the names of others."""

from torch import Tensor


def ported(ours: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Our weights under the names of pesser/pytorch_diffusion, written down here once more, word by word."""
    state = {}
    for name, tensor in ours.items():
        words = name.split(".")
        if words[0] == "time_embedding":
            state[f"temb.dense.{int(words[1][-1]) - 1}.{words[2]}"] = tensor
            continue
        if words[0] in ("conv_in", "conv_out", "norm_out"):
            state[name] = tensor
            continue
        rest = ".".join(words[-2:]).replace("time_proj", "temb_proj").replace("shortcut", "nin_shortcut")
        if words[0] == "mid":
            place = "mid.attn_1" if words[2] == "attention" else f"mid.block_{int(words[1]) + 1}"
        else:
            level = int(words[1]) if words[0] == "down" else levels - 1 - int(words[1])
            kind = {"res": "block", "attention": "attn"}
            resample = "downsample" if words[0] == "down" else "upsample"
            inner = resample if words[2] == "resample" else f"{kind[words[4]]}.{words[3]}"
            place = f"{words[0]}.{level}.{inner}"
        if words[-2] == "qkv":
            state |= {f"{place}.{q}.{words[-1]}": part for q, part in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            state[f"{place}.{rest}"] = tensor
    return state
