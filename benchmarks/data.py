"""Data: the latent loader against one file opened per sample, the size of a cache, REPA targets, image decoding.

    python benchmarks/data.py [--json F] [--parts loader size targets decoding] [--gib 4.2] [--folder DIR]

Prints one row per measurement, with its bar where it has one, and writes them to benchmarks/results/data.json (a part
that was not run keeps the rows of the last run). The latents of the loader's cache are random: only their bytes matter.
Images are real photographs (scikit-learn, matplotlib). The cache of several GiB lies in a temporary folder.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import statistics as stats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from data_loader import measure_loader
from data_rows import row
from PIL import Image
from timing import machine
from torch import Tensor

from sfd_fast.commands.encode import EncodeConfig, run_encode
from sfd_fast.config import ModelConfig, SemVAEConfig, SFDConfig, TransportConfig
from sfd_fast.data.cache.shards import write_shard
from sfd_fast.data.images.decode import load
from sfd_fast.data.load.latents import LatentShards
from sfd_fast.data.load.loader import LatentLoader
from sfd_fast.data.load.order import shuffled_indices
from sfd_fast.data.load.targets import open_targets, with_targets

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from harness.image_trees import encoded, photographs, write_tree  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "data.json"
SEEDS = (0, 1, 2)


# --- caches made from real photographs -------------------------------------------------------------------------------


def save_parts(folder: Path, *, width: int, latent_channels: int, levels: int, semvae: SemVAEConfig) -> dict[str, str]:
    """Randomly initialised DINOv2 and AutoencoderKL of the released shapes but little depth, and a SemVAE."""
    from diffusers import AutoencoderKL
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    from sfd_fast.formats.model_folder import save_model
    from sfd_fast.models.semvae import SemVAE

    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder / "vfm")
    plain = levels - 1
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
        block_out_channels=(32,) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
    ).save_pretrained(folder / "codec")
    save_model(folder / "semvae", SemVAE(semvae))
    return {name: str(folder / name) for name in ("vfm", "semvae")} | {"texture_codec": str(folder / "codec")}


def measure_size(folder: Path) -> list[dict]:
    """Bytes per image on disk of two caches of the same photographs, with the released shapes."""
    folder = folder / "size"
    tree = write_tree(folder / "tree", {"china": 12, "flower": 12, "hopper": 12})
    semvae = SemVAEConfig(architecture="linear", feature_channels=768, latent_channels=16)
    parts = save_parts(folder, width=768, latent_channels=32, levels=5, semvae=semvae)
    sizes = {}
    for name, storage, features in (("released", "fp32", True), ("semvae", "bf16", False), ("fp32", "fp32", False)):
        out = folder / name
        run_encode(EncodeConfig(images=str(tree), out=str(out), storage=storage, features=features, flip=True, **parts))
        sizes[name] = json.loads((out / "manifest.json").read_text())["bytes_per_image"]
    return [
        row("released cache (fp32, features, both flips)", sizes["released"] / 1e3, "kB/image"),
        row("cache for semvae targets, bf16, both flips", sizes["semvae"] / 1e3, "kB/image"),
        row("cache for semvae targets, fp32, both flips", sizes["fp32"] / 1e3, "kB/image"),
        row("semvae cache, bf16, over released", sizes["semvae"] / sizes["released"], "x", bar=0.125, at_most=True),
        row("semvae cache, fp32, over released", sizes["fp32"] / sizes["released"], "x", bar=0.125, at_most=True),
    ]


# --- REPA targets ----------------------------------------------------------------------------------------------------


def train_semvae(shards: LatentShards, path: str, steps: int) -> None:
    """Trains the SemVAE of a directory on the stored features, in place."""
    from sfd_fast.formats.model_folder import save_model
    from sfd_fast.formats.released_model import load_semvae
    from sfd_fast.models.semvae import semvae_loss

    semvae = load_semvae(path).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(semvae.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for batch in islice(LatentLoader(shards, 32, 0, num_workers=1), steps):
        features = batch["features"].float().flatten(2).transpose(1, 2)
        noise = torch.randn(32, features.shape[1], semvae.config.latent_channels, generator=generator)
        reconstruction, mean, logvar = semvae(features, noise)
        loss = semvae_loss(reconstruction, features, mean, logvar, kl_weight=1e-6)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(path, semvae.eval())


def train(config: SFDConfig, batches: Iterator[dict], held_out: list[dict], seed: int, steps: int) -> float:
    """Held-out velocity and cosine loss of a small network after `steps` steps of AdamW."""
    from sfd_fast.diffusion.transport import training_loss
    from sfd_fast.models.dit import LightningDiT

    torch.manual_seed(seed)
    model = LightningDiT(config.model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for batch in islice(batches, steps):
        loss, _ = training_loss(model, batch, config, seed=seed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    plain = replace(config, transport=replace(config.transport, repa_weight=0.0))
    with torch.no_grad():
        return stats.mean(training_loss(model, batch, plain, seed=10**6, drop=False)[0].item() for batch in held_out)


def measure_targets(folder: Path, steps: int = 400) -> list[dict]:
    """The same short runs with stored and with semvae targets, three seeds each, and without REPA."""
    folder = folder / "targets"
    tree = write_tree(folder / "tree", {"china": 200, "flower": 200, "hopper": 200})
    semvae = SemVAEConfig(
        feature_channels=48, hidden_size=48, num_heads=2, encoder_depth=1, decoder_depth=1, latent_channels=8
    )
    parts = save_parts(folder, width=48, latent_channels=4, levels=3, semvae=semvae)
    common = {"images": str(tree), "image_size": 32, "storage": "fp32", "features": True, "shard_size": 128}
    common["flip"] = True
    run_encode(EncodeConfig(out=str(folder / "untrained"), **common, **parts))
    train_semvae(LatentShards(folder / "untrained"), parts["semvae"], 600)
    run_encode(EncodeConfig(out=str(folder / "cache"), **common, **parts))
    cosine = json.loads((folder / "cache" / "manifest.json").read_text())["semvae_target_cosine"]
    whole = LatentShards(folder / "cache")
    statistics = whole.statistics()
    # held out: every class of the tree has a share of the last samples of a fixed shuffle
    order = shuffled_indices(torch.arange(len(whole)), len(whole), seed=99)
    shards = reordered(whole, folder / "shuffled", order)
    training, held = shards.slice(0, 500), shards.slice(500, len(shards))
    held_out = list(islice(LatentLoader(held, 50, 5, statistics=statistics, flip=False, shuffle=False), 2))
    config = SFDConfig(
        model=ModelConfig(
            hidden_size=64, depth=4, num_heads=4, grid_size=8, texture_channels=4, semantic_channels=8, num_classes=3,
            repa_channels=48, repa_depth=2, repa_hidden=64,
        ),
        transport=TransportConfig(repa_weight=0.5),
    )  # fmt: skip
    losses: dict[str, list[float]] = {}
    for kind in ("stored", "semvae", "none"):
        targets = open_targets(kind, whole, statistics, semvae=parts["semvae"]) if kind == "semvae" else None
        weight = 0.0 if kind == "none" else 0.5
        run = replace(config, transport=replace(config.transport, repa_weight=weight))
        losses[kind] = []
        for seed in SEEDS:
            loader = LatentLoader(
                training, 32, seed, statistics=statistics, features=kind == "stored", num_workers=1
            )
            losses[kind].append(train(run, with_targets(loader, targets), held_out, seed, steps))
            print(f"  {kind} seed {seed}: held-out loss {losses[kind][-1]:.4f}", flush=True)
    spread = max(losses["stored"]) - min(losses["stored"])
    difference = stats.mean(losses["semvae"]) - stats.mean(losses["stored"])
    rows = [row("cosine of semvae targets with the true features", cosine, "1")]
    rows += [row(f"held-out loss, {kind} targets, 3 seeds", losses[kind], "1") for kind in losses]
    rows.append(row("held-out loss, stored targets, largest less smallest of 3 seeds", spread, "1"))
    rows.append(row("held-out loss, semvae less stored, means of 3 seeds", difference, "1", bar=spread, at_most=True))
    return rows


def reordered(shards: LatentShards, folder: Path, order: Tensor) -> LatentShards:
    """The samples of a cache in another order, as one shard with all of its tensors."""
    plain = shards.gather(order, torch.zeros(len(order), dtype=torch.bool))
    flipped = shards.gather(order, torch.ones(len(order), dtype=torch.bool))
    names = {"texture": "latents", "semantic": "latents_sv", "features": "feats_dino"}
    tensors = {"labels": plain["labels"]}
    for key, name in names.items():
        tensors |= {name: plain[key].contiguous(), f"{name}_flip": flipped[key].contiguous()}
    write_shard(folder / "all.safetensors", tensors)
    return LatentShards(folder)


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_one(data: bytes) -> np.ndarray:
    """In a worker process: the exact crop."""
    return load(data, 256).numpy()


def jpegs(count: int) -> list[bytes]:
    """JPEG photographs of ImageNet's usual size, 500 x 375, quality 90."""
    images = list(photographs().values())
    random = np.random.default_rng(0)
    found = []
    for i in range(count):
        image = images[i % len(images)]
        scale = random.uniform(0.65, 1.0)
        width, height = int(image.width * scale), int(image.width * scale * 0.75)
        height = min(height, image.height)
        left = int(random.integers(0, image.width - width + 1))
        top = int(random.integers(0, image.height - height + 1))
        crop = image.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.BICUBIC)
        found.append(encoded(crop, quality=90))
    return found


def measure_decoding(folder: Path) -> list[dict]:
    """Images/s from JPEG bytes in memory to a 256 x 256 crop: PIL in a process pool, PIL in threads, DALI.

    Then of a whole `sfd encode`. Raises OSError where DALI failed in a batch: PIL's images are not DALI's.
    """
    from sfd_fast.data.images.decode import read_batches

    data, cores = jpegs(256), os.cpu_count() or 1
    sizes = [Image.open(io.BytesIO(item)).size for item in data]
    rounds = 7
    found: dict[str, list[float]] = {"processes": [], "threads": [], "dali": []}

    def rate(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return len(data) / (time.perf_counter() - start)

    batches = [list(range(first, first + 32)) for first in range(0, len(data), 32)]
    try:
        from sfd_fast.data.images.dali import DaliDecoder, import_dali, measure

        import_dali()
        decoder = DaliDecoder(256, batch_size=32, max_halvings=0, num_threads=cores)
    except ImportError as error:
        print(f"  {error}")
        decoder = None

    def dali() -> None:
        for batch in batches:
            decoder([data[i] for i in batch], [sizes[i] for i in batch], [True] * len(batch))
        if decoder.failures:
            raise OSError("DALI failed in a batch: its rate would be PIL's (the reason is in the log)")

    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("forkserver")) as pool:
        list(pool.map(decode_one, data[:32], chunksize=8))
        for turn in range(rounds + 1):
            measured = {
                "processes": rate(lambda: list(pool.map(decode_one, data, chunksize=16))),
                "threads": rate(lambda: list(read_batches(data.__getitem__, batches, 256, num_threads=cores))),
            }
            if decoder:
                measured["dali"] = rate(dali)
            for name, value in measured.items():
                found[name] += [value] * (turn > 0)
    rows = [
        row(f"decode and crop, PIL, {cores} processes", found["processes"], "images/s"),
        row(f"decode and crop, PIL, {cores} threads", found["threads"], "images/s"),
    ]
    if decoder:
        rows += [
            row(f"decode and crop, DALI on the CPU, {cores} threads", found["dali"], "images/s"),
            row("DALI over PIL in processes", [a / b for a, b in zip(found["dali"], found["processes"])], "x"),
            row("DALI against the exact crop, PSNR", measure(data[:48], 256), "dB"),
        ]
    return rows + measure_encoding(folder / "encoding", data[:64], ["pil", "dali"] if decoder else ["pil"])


def measure_encoding(folder: Path, data: list[bytes], decoders: list[str]) -> list[dict]:
    """Images/s of `sfd encode` from a screened folder to the manifest, with small encoders that are loaded already.

    256 x 256, 32 + 16 channels, no flips: an autoencoder of 32 channels, two layers of a DINOv2 of width 48.
    """
    from sfd_fast.data.encode.encoders import LatentEncoder
    from sfd_fast.data.encode.job import make_cache
    from sfd_fast.data.images.index import INDEX_FOLDER
    from sfd_fast.data.images.opening import open_index
    from sfd_fast.formats.released_model import load_semvae
    from sfd_fast.formats.texture import load_codec
    from sfd_fast.models.vfm import load_vfm
    from sfd_fast.ranks import Ranks

    (folder / "tree" / "all").mkdir(parents=True)
    for i, item in enumerate(data):
        (folder / "tree" / "all" / f"{i:04d}.jpg").write_bytes(item)
    semvae = SemVAEConfig(architecture="linear", feature_channels=48, latent_channels=16)
    parts = save_parts(folder, width=48, latent_channels=32, levels=5, semvae=semvae)
    encoder = LatentEncoder(
        load_vfm(parts["vfm"]), load_semvae(parts["semvae"]).eval(), load_codec(parts["texture_codec"]),
        image_size=256, dtype=torch.bfloat16, flip=False, posterior="sample", features=False, seed=0,
    )  # fmt: skip
    open_index(folder / "tree", folder / "index", report=lambda _: None)
    found: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(4):
        for name in decoders:
            out = folder / f"{name}{turn}"
            shutil.copytree(folder / "index", out / INDEX_FOLDER)
            options = {"images": str(folder / "tree"), "out": str(out), "device": "cpu"} | parts
            config = EncodeConfig(flip=False, decoder=name, **options)
            start = time.perf_counter()
            make_cache(config, encoder, Ranks(), lambda _: None)
            found[name] += [len(data) / (time.perf_counter() - start)] * (turn > 0)
            if json.loads((out / "manifest.json").read_text()).get("dali_failures"):
                raise OSError("DALI failed in a batch: its rate would be PIL's (the reason is in the log)")
    rows = [row(f"sfd encode, small encoders, {name}", found[name], "images/s") for name in decoders]
    if "dali" in found:
        ratios = [a / b for a, b in zip(found["dali"], found["pil"])]
        rows.append(row("sfd encode, small encoders, DALI over PIL", ratios, "x"))
    return rows


PARTS = {"loader": None, "size": measure_size, "targets": measure_targets, "decoding": measure_decoding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--gib", type=float, default=4.2, help="size of the loader's cache")
    parser.add_argument("--folder", type=Path, help="where the caches are made; default: the system's temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = machine("cpu")
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for part in options.parts:
            work = PARTS[part]
            found = measure_loader(Path(folder), options.gib) if work is None else work(Path(folder))
            kept = [r for r in kept if r["part"] != part] + [{"part": part} | r | where for r in found]
    rows = sorted(kept, key=lambda r: list(PARTS).index(r["part"]))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    for r in rows:
        sign = "at most" if r["at_most"] else "at least"
        bar = "" if r["bar"] is None else f"   {sign} {r['bar']:.4g}: {'holds' if r['holds'] else 'MISSED'}"
        spread = f"({r['low']:.4g} to {r['high']:.4g})"
        print(f"{r['part']:<9}{r['name']:<64}{r['value']:>12.4g} {r['unit']:<9}{spread}{bar}")


if __name__ == "__main__":
    main()
