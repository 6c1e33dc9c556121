"""Settings of released SemVAE checkpoints as our config, and back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sfd_fast.config import SemVAEConfig
from sfd_fast.formats.released_config import VISION_CHANNELS

HEADS = ("transformer_heads", "num_heads")
"""names under which the number of attention heads may stand"""


def semvae_config(weights: Mapping[str, Tensor], settings: Mapping[str, Any] | None) -> SemVAEConfig:
    """Config of SemVAE weights from their shapes; the number of heads stands only in the settings (docs/METHOD.md 6).

    settings: the YAML tree of the checkpoint, or a flat dictionary with `num_heads`.
    Raises ValueError where the weights are no SemVAE's or the number of heads is unknown.
    """
    settings = settings or {}
    linears = {side: _linears(weights, side) for side in ("encoder", "decoder")}
    if not linears["encoder"] or not linears["decoder"]:
        raise ValueError("these are not the weights of a SemVAE: they have no encoder.N or decoder.N")
    first, last = linears["decoder"][0], linears["decoder"][-1]
    features, latents = weights[last].shape[0], weights[first].shape[1]
    if weights[linears["encoder"][-1]].shape[0] != 2 * latents:
        raise ValueError(
            f"the encoder ends in {weights[linears['encoder'][-1]].shape[0]} channels and the decoder takes {latents}: "
            "only variational SemVAEs (twice the channels) are supported"
        )
    loss_weight = _find(settings, "kl_weight")
    common = {"feature_channels": features, "latent_channels": latents}
    if loss_weight is not None:
        common["kl_weight"] = float(loss_weight)
    depths = {
        f"{side}_depth": len({k.split(".")[1] for k in weights if k.startswith(f"{side}.") and ".mlp.0.w" in k})
        for side in linears
    }
    num_layers = 1 + len({key.split(".")[1] for key in weights if key.startswith("encoder.") and ".gate.w" in key})
    if any(".attn.in_proj_weight" in key for key in weights):
        heads = [value for key in HEADS if (value := _find(settings, key)) is not None]
        if not heads:
            raise ValueError("the number of attention heads is unknown (shapes do not tell it): pass {'num_heads': 6}")
        width = weights["encoder.0.weight"].shape[0]
        return SemVAEConfig("transformer", hidden_size=width, num_heads=int(heads[0]), **depths, **common)
    width = weights["encoder.0.gate.weight" if "encoder.0.gate.weight" in weights else "encoder.0.weight"].shape[0]
    heads = {"num_heads": 1}  # no attention
    if depths["encoder_depth"]:
        return SemVAEConfig("resnet", hidden_size=width, num_layers=num_layers, **heads, **depths, **common)
    if num_layers > 1:
        return SemVAEConfig("mlp", hidden_size=width, num_layers=num_layers, **heads, **common)
    return SemVAEConfig("linear", hidden_size=width, **heads, **common)


def _linears(weights: Mapping[str, Tensor], side: str) -> list[str]:
    """Weight matrices of the first and last layer of a stack, in order."""
    keys = [key for key in weights if key.startswith(f"{side}.") and weights[key].ndim == 2]
    return sorted(keys, key=lambda key: int(key.split(".")[1])) if all(k.split(".")[1].isdigit() for k in keys) else []


def _find(tree: Any, key: str) -> Any:
    """The value of `key` anywhere in a tree of dictionaries."""
    if not isinstance(tree, Mapping):
        return None
    if key in tree:
        return tree[key]
    return next((found for value in tree.values() if (found := _find(value, key)) is not None), None)


def semvae_to_released(config: SemVAEConfig) -> dict[str, Any]:
    """The released YAML tree of a SemVAE: what its checkpoints carry as a string."""
    params = {"hidden_dim": config.hidden_size}
    if config.architecture == "transformer":
        params |= {"transformer_heads": config.num_heads, "transformer_blocks": config.encoder_depth}
    if config.architecture in ("mlp", "resnet"):
        params["num_layers"] = config.num_layers
    if config.architecture == "resnet":
        params["num_res_blocks"] = config.encoder_depth
    vision = [name for name, channels in VISION_CHANNELS.items() if channels == config.feature_channels]
    return {
        "model": {"arch": config.architecture, "variational": True, "bottleneck_dim": config.latent_channels,
                  "params": params},
        "data": {"model_name": (vision or [None])[0]},
        "training": {"loss": {"mse_weight": 1.0, "l1_weight": 0.0, "cos_weight": 1.0, "kl_weight": config.kl_weight}},
    }  # fmt: skip
