"""Reading caches: released layout, gathers, the loader's order, ranks, resume, and errors that name the file."""

import contextlib
import itertools

import pytest
import torch
from safetensors.torch import save_file

from sfd_fast.data.cache.shards import write_json, write_shard
from sfd_fast.data.load.latents import LatentShards
from sfd_fast.data.load.loader import LatentLoader
from sfd_fast.diffusion.statistics import LatentStatistics, multiply_add


def make_cache(
    folder, sizes=(7, 5, 11), *, texture=3, semantic=2, grid=4, features=None, dtype=torch.float32, flip=True
):
    """A cache in the released layout, written by safetensors itself; returns the concatenated tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(0)
    shapes = {"latents": (texture, grid, grid)}
    if semantic:
        shapes["latents_sv"] = (semantic, grid, grid)
    shards = []
    for number, n in enumerate(sizes):
        shard = {"labels": torch.randint(0, 10, (n,), generator=g)}
        for key, shape in shapes.items():
            for name in (key, f"{key}_flip") if flip else (key,):
                shard[name] = torch.randn(n, *shape, generator=g).to(dtype)
        if features:
            for name in ("feats_dino", "feats_dino_flip"):
                shard[name] = torch.randn(n, features, 2, 2, generator=g).half()
        save_file(shard, folder / f"shard{number:03d}.safetensors")
        shards.append(shard)
    LatentStatistics(
        torch.arange(texture).float(), torch.full((texture,), 2.0), torch.zeros(semantic), torch.ones(semantic)
    ).save(folder)
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def take(loader, count):
    iterator = iter(loader)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gather_returns_the_released_layouts_rows(tmp_path, dtype):
    stored = make_cache(tmp_path, features=6, dtype=dtype)
    shards = LatentShards(tmp_path)
    indices = torch.tensor([22, 0, 7, 7, 11, 12, 6])
    flip = torch.tensor([True, False, False, True, True, False, True])
    out = shards.gather(indices, flip)
    pick = lambda key: torch.where(flip.view(-1, 1, 1, 1), stored[f"{key}_flip"][indices], stored[key][indices])  # noqa: E731
    assert torch.equal(out["texture"], pick("latents")) and out["texture"].dtype == dtype
    assert torch.equal(out["semantic"], pick("latents_sv"))
    assert torch.equal(out["features"], pick("feats_dino"))
    assert torch.equal(out["labels"], stored["labels"][indices])
    assert (len(shards), shards.texture_channels, shards.semantic_channels, tuple(shards.grid)) == (23, 3, 2, (4, 4))
    assert shards.feature_shape == (6, 2, 2)


@pytest.mark.parametrize("flip", [False, True])
def test_rows_of_whole_pages_are_gathered_alike(tmp_path, flip):
    """Our shards keep such rows on page borders, safetensors' own do not: two ways of copying, one result."""
    stored = make_cache(tmp_path / "released", texture=2, semantic=1, grid=32)
    for number, start, stop in ((0, 0, 7), (1, 7, 12), (2, 12, 23)):
        rows = {name: value[start:stop].contiguous() for name, value in stored.items()}
        write_shard(tmp_path / "ours" / f"{number}.safetensors", rows)
    indices, flipped = torch.tensor([3, 22, 8, 8, 0, 12]), torch.full((6,), flip)
    shards = [LatentShards(tmp_path / name) for name in ("released", "ours")]
    assert [s._runs is not None for s in shards] == [False, True]
    for out in (s.gather(indices, flipped) for s in shards):
        for key, name in (("texture", "latents"), ("semantic", "latents_sv")):
            assert torch.equal(out[key], stored[f"{name}_flip" if flip else name][indices])
        assert torch.equal(out["labels"], stored["labels"][indices])


def pca_cache(folder, **channels):
    """A cache of 3 samples with those tensors, and the genuine statistics: none of PCA."""
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(3, count, 2, 2, generator=g) for name, count in channels.items()}
    write_shard(folder / "a.safetensors", tensors | {"labels": torch.arange(3)})
    for name in ("latents", "latents_sv"):
        if name in channels:
            shape = (1, channels[name], 1, 1)
            torch.save({"mean": torch.full(shape, 2.0), "std": torch.full(shape, 4.0)}, folder / f"{name}_stats.pt")
    return tensors


@pytest.mark.parametrize(
    ("channels", "semantic"),
    [({"latents": 2, "latents_dino": 3, "latents_sv": 1}, 4), ({"latents": 2, "latents_dino": 3}, 3),
     ({"latents": 2, "latents_sv": 1}, 1), ({"latents": 2}, 0)],
)  # fmt: skip
def test_the_composite_is_texture_pca_semantics_and_pca_is_never_normalised(tmp_path, channels, semantic):
    tensors = pca_cache(tmp_path, **channels)
    shards = LatentShards(tmp_path)
    assert (shards.texture_channels, shards.semantic_channels) == (2, semantic)
    out = shards.gather(torch.tensor([2, 1]), torch.tensor([False, False]))
    stored = torch.cat([tensors[name] for name in channels], dim=1)
    assert torch.equal(torch.cat([out["texture"], out["semantic"]], dim=1), stored[[2, 1]])
    batch = take(LatentLoader(shards, 3, seed=0, flip=False, shuffle=False), 1)[0]
    parts = [v if name == "latents_dino" else (v - 2) / 4 for name, v in tensors.items()]
    torch.testing.assert_close(batch["latents"], torch.cat(parts, dim=1))


def test_a_model_says_whether_pca_beside_semvae_latents_is_semantic(tmp_path):
    pca_cache(tmp_path, latents=2, latents_dino=3, latents_sv=1)
    shards = LatentShards(tmp_path, semantic_channels=1)
    assert (shards.texture_channels, shards.semantic_channels) == (5, 1)
    assert shards.statistics().texture_std.tolist() == [4, 4, 1, 1, 1]
    assert LatentShards(tmp_path, semantic_channels=4).semantic_channels == 4


def test_a_cache_of_texture_alone_has_no_semantic_channels(tmp_path):
    make_cache(tmp_path, semantic=0)
    shards = LatentShards(tmp_path)
    assert shards.semantic_channels == 0
    assert shards.gather(torch.tensor([3]), torch.tensor([True]))["semantic"].shape == (1, 0, 4, 4)
    assert take(LatentLoader(shards, 4, seed=0), 1)[0]["latents"].shape == (4, 3, 4, 4)


def test_every_epoch_shows_every_sample_once_whatever_the_sizes(tmp_path):
    make_cache(tmp_path)
    loader = LatentLoader(LatentShards(tmp_path), 5, seed=1, flip=False)
    labels = torch.cat([batch["sample_ids"] for batch in take(loader, 23)])
    assert torch.equal(labels, torch.arange(115))
    for epoch in range(5):
        indices = loader.indices(torch.arange(23) + 23 * epoch)
        assert torch.equal(indices.sort().values, torch.arange(23))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_are_disjoint_and_together_the_global_batch(tmp_path, world_size):
    make_cache(tmp_path, features=4)
    shards = LatentShards(tmp_path)
    whole = take(LatentLoader(shards, 6, seed=3), 9)
    ranks = [take(LatentLoader(shards, 6, 3, rank, world_size), 9) for rank in range(world_size)]
    for step in range(9):
        for name in whole[step]:
            assert torch.equal(torch.cat([batches[step][name] for batches in ranks]), whole[step][name])


def test_order_and_bytes_do_not_depend_on_workers(tmp_path):
    make_cache(tmp_path, features=4, dtype=torch.bfloat16)
    shards = LatentShards(tmp_path)
    runs = [take(LatentLoader(shards, 8, seed=2, num_workers=workers), 12) for workers in (0, 1, 2, 5)]
    for other in runs[1:]:
        for a, b in zip(runs[0], other):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_exactly(tmp_path, workers):
    make_cache(tmp_path)
    shards = LatentShards(tmp_path)
    whole = take(LatentLoader(shards, 8, seed=2, num_workers=workers), 11)
    loader = LatentLoader(shards, 8, seed=2, num_workers=workers)
    take(loader, 4)
    assert loader.step == 4
    rest = take(LatentLoader(shards, 8, seed=2, start_step=loader.step, num_workers=workers), 7)
    for a, b in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_batches_are_normalised_and_stay_valid_while_the_loader_runs_on(tmp_path):
    stored = make_cache(tmp_path)
    loader = LatentLoader(LatentShards(tmp_path), 8, seed=2, flip=False)
    statistics = loader.statistics
    for batch in take(loader, 10):
        index = loader.indices(batch["sample_ids"])
        texture = (stored["latents"][index] - statistics.texture_mean.view(-1, 1, 1)) / 2.0
        torch.testing.assert_close(batch["latents"], torch.cat([texture, stored["latents_sv"][index]], dim=1))
        assert torch.equal(batch["labels"], stored["labels"][index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_have_the_bits_of_the_statistics_own_normalisation(tmp_path, dtype):
    """Held-out batches are normalised there."""
    stored = make_cache(tmp_path, dtype=dtype)
    loader = LatentLoader(LatentShards(tmp_path), 8, seed=2, flip=False)
    batch = take(loader, 1)[0]
    index = loader.indices(batch["sample_ids"])
    expected = loader.statistics.normalize(stored["latents"][index].float(), stored["latents_sv"][index].float())
    assert torch.equal(batch["latents"], expected)


def test_latents_are_normalised_in_one_kernel():
    """On a device one operator reads each value once and writes it once: no copy, no second pass."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    for dtype in (torch.float32, torch.bfloat16):
        with FakeTensorMode(allow_non_fake_inputs=True):
            latents = torch.empty(8, 5, 4, 4, dtype=dtype, device="cuda")
            scale, shift = torch.empty(2, 5, 4, 4, device="cuda")
            called.clear()
            with Record():
                out = multiply_add(latents, scale, shift)
        assert len(called) == 1 and called[0].startswith("aten.addcmul"), called
        assert out.dtype == torch.float32


def test_a_value_that_is_not_finite_is_named(tmp_path):
    stored = make_cache(tmp_path, features=4)
    shard = {name: value[7:12].clone() for name, value in stored.items()}
    shard["latents_sv_flip"][3, 1, 2, 2] = float("nan")
    shard["feats_dino"][1, 0, 0, 0] = float("inf")
    save_file(shard, tmp_path / "shard001.safetensors")
    shards = LatentShards(tmp_path)
    bad, plain, mirrored = torch.tensor([2, 10]), torch.tensor([False, False]), torch.tensor([False, True])
    assert "shard001.safetensors: the mirrored latents of sample 3" in shards.flaw(bad, mirrored, features=False)
    assert shards.flaw(bad, plain, features=True) == ""
    found = shards.flaw(torch.tensor([8]), plain[:1], features=True)
    assert "shard001.safetensors: the features of sample 1 hold NaN or infinity" in found
    loader = LatentLoader(shards, 23, seed=2, features=False)
    steps = [step for step in range(20) if loader.flaw(step)]
    epochs = [loader.positions(step) for step in range(20)]  # an epoch is one batch here
    expected = [k for k, p in enumerate(epochs) if loader.flips(p)[loader.indices(p) == 10]]
    assert steps == expected and 0 < len(steps) < 20


def test_both_streams_and_the_features_flip_together(tmp_path):
    stored = make_cache(tmp_path, features=4)
    loader = LatentLoader(LatentShards(tmp_path), 23, seed=2, statistics=LatentStatistics.identity(3, 2))
    batch = take(loader, 1)[0]
    index = loader.indices(batch["sample_ids"])
    flipped = []
    for row, i in enumerate(index.tolist()):
        is_flip = torch.equal(batch["features"][row], stored["feats_dino_flip"][i])
        suffix = "_flip" if is_flip else ""
        flipped.append(is_flip)
        both = torch.cat([stored[f"latents{suffix}"][i], stored[f"latents_sv{suffix}"][i]])
        torch.testing.assert_close(batch["latents"][row], both)
        assert torch.equal(batch["features"][row], stored[f"feats_dino{suffix}"][i])
    assert 0 < sum(flipped) < 23


def test_slices_divide_the_set(tmp_path):
    stored = make_cache(tmp_path)
    shards = LatentShards(tmp_path)
    train, held_out = shards.slice(0, 15), shards.slice(15, 23)
    assert (len(train), len(held_out), len(held_out.slice(2, 5))) == (15, 8, 3)
    out = held_out.slice(2, 5).gather(torch.arange(3), torch.zeros(3, dtype=torch.bool))
    assert torch.equal(out["texture"], stored["latents"][17:20])
    with pytest.raises(IndexError, match="indices 0 to 15"):
        train.gather(torch.tensor([0, 15]), torch.zeros(2, dtype=torch.bool))


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    """At most 16 bytes a sample; all that grows here is one small table row per shard."""
    import tracemalloc

    n = 300_000
    write_shard(tmp_path / "a.safetensors", {"latents": torch.zeros(n, 1, 1, 1), "labels": torch.zeros(n).long()})
    tracemalloc.start()
    loader = LatentLoader(
        LatentShards(tmp_path), 64, 0, flip=False, statistics=LatentStatistics.identity(1, 0), num_workers=0
    )
    take(loader, 3)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 16 * n / 4, f"{held} bytes for {n} samples"


def test_user_mistakes_are_clear(tmp_path):
    make_cache(tmp_path, flip=False)
    shards = LatentShards(tmp_path)
    with pytest.raises(ValueError, match="no flipped latents.*set data.flip to false"):
        LatentLoader(shards, 8, seed=0)
    with pytest.raises(ValueError, match="no VFM features"):
        LatentLoader(shards, 8, seed=0, flip=False, features=True)
    with pytest.raises(ValueError, match="global_batch_size 8 must be a multiple of the 3 ranks"):
        LatentLoader(shards, 8, seed=0, rank=0, world_size=3)
    with pytest.raises(ValueError, match="statistics of 4 channels for latents of 5"):
        LatentLoader(shards, 8, seed=0, flip=False, statistics=LatentStatistics.identity(2, 2))


def test_statistics_of_another_cache_are_refused(tmp_path):
    make_cache(tmp_path)
    (tmp_path / "latents_stats.pt").unlink()
    LatentStatistics.identity(4, 2).save(tmp_path)
    with pytest.raises(ValueError, match=r"statistics in .* are of 4 \+ 2 channels, its latents have 3 \+ 2"):
        LatentLoader(LatentShards(tmp_path), 8, seed=0)


def damage_shape(shard):
    shard["latents_sv"] = torch.randn(4, 5, 4, 4)


def damage_dtype(shard):
    shard["latents"] = shard["latents"].half()


def damage_keys(shard):
    del shard["latents_sv_flip"]


def damage_count(shard):
    shard["labels"] = torch.arange(3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage_shape, "'latents_sv' is"), (damage_dtype, "'latents' is"), (damage_keys, "latents_sv_flip"),
     (damage_count, "has 4 samples but there are 3 labels")],
)  # fmt: skip
def test_a_shard_of_another_cache_is_an_error_that_names_it(tmp_path, damage, message):
    make_cache(tmp_path)
    keys = {"latents": 3, "latents_flip": 3, "latents_sv": 2, "latents_sv_flip": 2}
    shard = {k: torch.randn(4, c, 4, 4) for k, c in keys.items()} | {"labels": torch.arange(4)}
    damage(shard)
    save_file(shard, tmp_path / "shard900.safetensors")
    with pytest.raises(ValueError, match=f"shard900.safetensors.*{message}"):
        LatentShards(tmp_path)


def test_shards_of_two_encodings_do_not_mix(tmp_path):
    tensors = {"latents": torch.ones(2, 1, 1, 1), "labels": torch.arange(2)}
    write_shard(tmp_path / "a.safetensors", tensors, {"fingerprint": "1"})
    write_shard(tmp_path / "b.safetensors", tensors, {"fingerprint": "2"})
    with pytest.raises(ValueError, match="b.safetensors was encoded with other settings than .*a.safetensors"):
        LatentShards(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    make_cache(tmp_path)
    size = (tmp_path / "shard000.safetensors").stat().st_size
    shards = {f"shard00{i}.safetensors": {"bytes": size, "sha256": ""} for i in (0, 3)}
    write_json(tmp_path / "manifest.json", {"format": 1, "complete": True, "shards": shards})
    with pytest.raises(FileNotFoundError, match="shard003.safetensors is missing"):
        LatentShards(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        LatentShards(tmp_path / "nowhere")


def test_an_error_in_a_worker_reaches_the_caller(tmp_path, monkeypatch):
    make_cache(tmp_path)
    shards = LatentShards(tmp_path)
    monkeypatch.setattr(shards, "fill", lambda *a: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        take(LatentLoader(shards, 4, seed=0), 1)


class StreamOnTheHost:
    """A CUDA stream and its events as the loader uses them, on a machine without CUDA: everything is done at once."""

    def __init__(self, device=None):
        self.waited_for = []

    def record_event(self):
        return self

    def wait_event(self, event):
        self.waited_for.append(event)

    def synchronize(self):
        pass


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_double_buffered_path_gives_the_same_batches(tmp_path, monkeypatch, workers):
    """Order, slots and look-ahead of the transfer, with the stream replaced; the copies themselves need a GPU."""
    make_cache(tmp_path, features=4, dtype=torch.bfloat16)
    shards = LatentShards(tmp_path)
    host = take(LatentLoader(shards, 8, seed=2, num_workers=0), 20)
    loader = LatentLoader(shards, 8, seed=2, num_workers=workers)
    current, slot = StreamOnTheHost(), shards.slot
    monkeypatch.setattr(shards, "slot", lambda size, *, features, pinned=False: slot(size, features=features))
    monkeypatch.setattr(torch.cuda, "Stream", StreamOnTheHost)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    batches = loader._on_device()
    device = list(itertools.islice(batches, 20))
    batches.close()
    assert len(current.waited_for) == 20
    for a, b in zip(host, device, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.gpu
def test_batches_on_the_device_equal_those_on_the_host(tmp_path):
    make_cache(tmp_path, features=4)
    shards = LatentShards(tmp_path)
    host = take(LatentLoader(shards, 8, seed=2), 20)
    device = take(LatentLoader(shards, 8, seed=2, device="cuda"), 20)
    for a, b in zip(host, device):
        torch.testing.assert_close(b["latents"].cpu(), a["latents"])
        assert all(torch.equal(b[name].cpu(), a[name]) for name in a if name != "latents")


def test_mirrored_latents_need_mirrored_features(tmp_path):
    """Else REPA would align a flipped image with the features of the plain one, without a word."""
    shard = {
        "labels": torch.arange(4), "latents": torch.zeros(4, 3, 4, 4), "latents_flip": torch.zeros(4, 3, 4, 4),
        "latents_sv": torch.zeros(4, 2, 4, 4), "latents_sv_flip": torch.zeros(4, 2, 4, 4),
        "feats_dino": torch.zeros(4, 6, 2, 2),
    }  # fmt: skip
    save_file(shard, tmp_path / "shard.safetensors")
    LatentStatistics(torch.zeros(3), torch.ones(3), torch.zeros(2), torch.ones(2)).save(tmp_path)
    shards = LatentShards(tmp_path)
    with pytest.raises(ValueError, match="no flipped VFM features \\(feats_dino_flip\\).*data.flip to false"):
        LatentLoader(shards, 4, seed=0)
    assert len(take(LatentLoader(shards, 4, seed=0, features=False), 1)) == 1
    assert len(take(LatentLoader(shards, 4, seed=0, flip=False), 1)) == 1
