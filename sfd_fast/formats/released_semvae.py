"""SemVAE's settings in the released system (checkpoints, training files, the PCA baseline) as ours, and back."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sfd_fast.config import OptimizerConfig, RunConfig, SemVAEConfig, SemVAETrainingConfig, TrainConfig
from sfd_fast.formats.released_network import VISION_CHANNELS, vision_channels

if TYPE_CHECKING:  # settings alone are read without torch
    from torch import Tensor

HEADS = ("transformer_heads", "num_heads")
"""names under which the number of attention heads may stand"""


def semvae_config(weights: "Mapping[str, Tensor]", settings: Mapping[str, Any] | None) -> SemVAEConfig:
    """Config of SemVAE weights from their shapes; the number of heads stands only in the settings (docs/METHOD.md 6).

    settings: the YAML tree of the checkpoint, or a flat dictionary with `num_heads`.
    Raises ValueError where the weights are no SemVAE's or the number of heads is unknown.
    """
    settings = settings or {}
    if "pca.components" in weights:
        latents, features = weights["pca.components"].shape
        return SemVAEConfig("pca", feature_channels=features, latent_channels=latents)
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


def _linears(weights: "Mapping[str, Tensor]", side: str) -> list[str]:
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


UNSUPPORTED = {"l1_weight": 0.0, "mse_weight": 1.0, "cos_weight": 1.0, "classification_weight": 0.0}
"""weights of the released loss that have one value here"""
PRECISIONS = {"no": "fp32", "bf16": "parity", "fp16": "fp16"}


def read_training_config(tree: Mapping[str, Any]) -> tuple[SemVAETrainingConfig, list[str]]:
    """A released training file of SemVAE as our configuration, and what has no counterpart.

    The loss is that of the released script: the cosine along the tokens (docs/METHOD.md 2). The folder of features is
    not read: `sfd features` writes them.
    Raises ValueError for settings that this system would compute otherwise.
    """
    model, data, training = (tree.get(name) or {} for name in ("model", "data", "training"))
    params, loss = model.get("params") or {}, training.get("loss") or {}
    optimizer, schedule = training.get("optimizer") or {}, training.get("scheduler") or {}
    for name, allowed in UNSUPPORTED.items():
        if loss.get(name, allowed) != allowed:
            raise ValueError(f"released setting training.loss.{name}: {loss[name]} is not supported; only {allowed} is")
    kind = optimizer.get("type", "AdamW")
    if not model.get("variational", True) or kind not in ("AdamW", "Adam"):
        raise ValueError(f"released SemVAE settings need variational: true and optimizer AdamW or Adam, not {kind}")
    precision = str(training.get("mixed_precision", "no"))
    if precision not in PRECISIONS:
        raise ValueError(f"training.mixed_precision: {precision} is unknown; known: {', '.join(PRECISIONS)}")
    blocks = params.get("transformer_blocks", params.get("num_res_blocks"))
    depths = {} if blocks is None else {"encoder_depth": blocks, "decoder_depth": blocks}
    warmup, constant = schedule.get("warmup_steps", 500), schedule.get("constant_steps", 800_000)
    config = SemVAETrainingConfig(
        semvae=SemVAEConfig(
            architecture=model.get("arch", "transformer"), feature_channels=vision_channels(data.get("model_name")),
            cosine_axis="tokens", **depths,
            **_present(latent_channels=model.get("bottleneck_dim"), hidden_size=params.get("hidden_dim"),
                       num_heads=params.get("transformer_heads"), num_layers=params.get("num_layers"),
                       kl_weight=loss.get("kl_weight")),
        ),
        optimizer=OptimizerConfig(
            lr=optimizer.get("lr", 5e-5), weight_decay=0.01 if kind == "AdamW" else 0.0, warmup_steps=max(warmup, 1),
            warmup_start=0.01, schedule="cosine", decay_start=max(warmup, 1) + constant, final_lr_ratio=0.1,
            ema_decay=0.0,
        ),
        train=TrainConfig(
            precision=PRECISIONS[precision],
            **_present(max_steps=training.get("total_iterations"), global_batch_size=_find(tree, "batch_size")),
        ),
        run=RunConfig(
            sample_every=0, keep_checkpoints=0,
            **_present(out=_find(training, "checkpoint_dir"), checkpoint_every=_find(training, "save_every"),
                       log_every=_find(training, "log_every"), validate_every=_find(training, "eval_every")),
        ),
    )  # fmt: skip
    read = {"model_name", "batch_size"}
    return config, [f"data.{key} = {value}" for key, value in data.items() if key not in read and value is not None]


def _present(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def is_pca(tree: object) -> bool:
    """Whether a torch file holds a PCA of features."""
    return isinstance(tree, Mapping) and ("pca_model" in tree or {"mean", "components"} <= set(tree))


def pca_weights(tree: Mapping[str, Any], latent_channels: int | None = None) -> "dict[str, Tensor]":
    """Weights of a SemVAE of architecture pca from the authors' file: {"pca_model": scikit-learn's PCA, "mean", "std"}.

    It projects (f - mean) / std - PCA's own mean on the leading components; one of mean and components alone is read
    too. latent_channels: how many components; None: the 8 of the released caches of a full PCA (docs/METHOD.md 6), else
    all. Raises ValueError where something is missing or of another shape.
    """
    import torch

    fitted = tree.get("pca_model") if isinstance(tree.get("pca_model"), Mapping) else {}
    components = fitted.get("components_", tree.get("components"))
    inner, outer = fitted.get("mean_"), tree.get("mean")
    if components is None or (inner is None and outer is None):
        raise ValueError("this is no PCA of features: it needs pca_model (or components) and mean")
    components = torch.as_tensor(components).double()
    width = components.shape[-1]
    zeros, ones = torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
    inner, outer, std = (
        default if value is None else torch.as_tensor(value).double()
        for value, default in ((inner, zeros), (outer, zeros), (tree.get("std"), ones))
    )
    if latent_channels is None:
        latent_channels = 8 if len(components) == width else len(components)
    shapes = [tuple(value.shape) for value in (inner, outer, std)]
    if components.ndim != 2 or shapes != [(width,)] * 3 or len(components) < latent_channels:
        raise ValueError(
            f"a PCA of {latent_channels} components needs at least as many rows of one width as mean and std; the file "
            f"has components {tuple(components.shape)}, means and std {shapes}"
        )
    weights = {"mean": outer + std * inner, "components": components[:latent_channels], "scale": std}
    return {f"pca.{name}": value.float() for name, value in weights.items()}
