"""Torch files: safe reading, damage, and writing back."""

import builtins
import importlib
import os
import pickle
import shutil
import subprocess
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from harness.support import GOLDEN
from omegaconf import DictConfig, OmegaConf
from sklearn.decomposition import PCA

from sfd_fast.files.torch_file import PickledConfig, read_torch_file, write_torch_file
from sfd_fast.formats.released_file import pack_tree, state_dict_of, unpack_tree

OFFICIAL = GOLDEN / "sfd.official.pt"


SETTINGS = {
    "model": {"model_type": "LightningDiT-XL/1", "semfirst_delta_t": 0.3, "betas": [0.9, 0.999], "none": None},
    "train": {"exp_name": "x", "use": True, "path": "${train.exp_name}/out", "nested": {"list": [{"a": 1}]}},
}


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Builds:
    """Pickles as an object of a class with a state."""

    def __init__(self, kind, state):
        self.kind, self.state = kind, state

    def __reduce__(self):
        return self.kind.__new__, (self.kind,), self.state


def same(a, b):
    """Equality of trees with tensors, types and order included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, DictConfig):
        return a == b
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a) and vars_of(a) == vars_of(b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def vars_of(value):
    return getattr(value, "__dict__", {})


def checkpoint(**extra):
    weights = OrderedDict(w=torch.randn(2, 3), b=torch.randn(3, dtype=torch.bfloat16), n=torch.tensor(4))
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2)}}, "param_groups": [
        {"lr": 1e-4, "betas": (0.9, 0.999), "fused": None, "params": [0, 1]}]}  # fmt: skip
    config = OmegaConf.create(SETTINGS)
    return {"model": weights, "ema": OrderedDict(weights), "opt": optimizer, "config": config} | extra


def test_omegaconf_settings_become_plain_data_without_omegaconf_running(tmp_path, monkeypatch):
    torch.save(checkpoint(), tmp_path / "a.pt")
    monkeypatch.setattr(DictConfig, "__setstate__", None)
    config = read_torch_file(tmp_path / "a.pt")["config"]
    assert isinstance(config, PickledConfig)
    assert config == SETTINGS  # an interpolation stays text


@pytest.mark.golden
def test_the_released_checkpoint_is_read_whole():
    tree = read_torch_file(OFFICIAL)
    expected = torch.load(OFFICIAL, weights_only=False)
    assert list(tree) == ["model", "ema", "opt", "config"]
    assert tree["config"] == OmegaConf.to_container(expected["config"])
    assert same(tree["opt"], expected["opt"])
    assert same(tree["model"], expected["model"]) and same(tree["ema"], expected["ema"])


@pytest.mark.golden
def test_the_released_checkpoint_is_written_back_identically(tmp_path):
    tree = read_torch_file(OFFICIAL)
    text, tensors = pack_tree(tree, {})
    write_torch_file(tmp_path / "again.pt", unpack_tree(text, tensors, {}))
    again, expected = (torch.load(path, weights_only=False) for path in (tmp_path / "again.pt", OFFICIAL))
    assert same(again, expected)
    assert isinstance(again["config"], DictConfig)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "attack",
    [
        lambda flag: Calls(os.system, f"touch {flag}"),
        lambda flag: Calls(subprocess.check_call, ["touch", str(flag)]),
        lambda flag: Calls(builtins.eval, f"open({str(flag)!r}, 'w')"),
        lambda flag: Calls(builtins.getattr, Calls(importlib.import_module, "os"), "system"),
        lambda flag: Calls(shutil.rmtree, str(flag.parent)),
        lambda flag: Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {flag}"))),
        lambda flag: Calls(open, str(flag), "w"),
    ],
    ids=["system", "subprocess", "eval", "getattr", "rmtree", "nested", "open"],
)
@pytest.mark.parametrize("place", [lambda evil: evil, lambda evil: checkpoint(config=evil),
                                   lambda evil: checkpoint(opt=[{"state": evil}])],
                         ids=["root", "config", "optimizer"])  # fmt: skip
def test_a_malicious_pickle_is_refused_and_nothing_in_it_runs(tmp_path, attack, place, legacy):
    (tmp_path / "victim").mkdir()
    flag = tmp_path / "victim" / "flag"
    torch.save(place(attack(flag)), tmp_path / "evil.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"evil.pt is refused: it asks to load '[\w.]+', which could run foreign code"):
        read_torch_file(tmp_path / "evil.pt")
    assert (tmp_path / "victim").is_dir() and not flag.exists()


def test_code_hidden_behind_a_settings_class_does_not_run(tmp_path):
    """OmegaConf's classes are replaced by inert ones: their state may hold plain data only."""
    torch.save({"config": Builds(DictConfig, {"_content": Calls(os.system, f"touch {tmp_path / 'flag'}")})},
               tmp_path / "evil.pt")  # fmt: skip
    with pytest.raises(ValueError, match="is refused"):
        read_torch_file(tmp_path / "evil.pt")
    assert not (tmp_path / "flag").exists()


def test_settings_that_contain_themselves_are_refused(tmp_path):
    config = OmegaConf.create({"a": {}})
    config.__dict__["_content"]["a"].__dict__["_content"]["b"] = config
    torch.save({"config": config}, tmp_path / "loop.pt")
    with pytest.raises(ValueError, match="refers to itself without end"):
        read_torch_file(tmp_path / "loop.pt")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path, share):
    torch.save(checkpoint(big=torch.zeros(1000)), tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="cut.pt is truncated or damaged"):
        read_torch_file(tmp_path / "cut.pt")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint at all\n" * 10)
    with pytest.raises(ValueError, match="text.pt is (truncated or damaged|refused)"):
        read_torch_file(tmp_path / "text.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.pt does not exist"):
        read_torch_file(tmp_path / "gone.pt")


def test_callback_states_of_lightning_do_not_stop_an_autoencoder_from_loading(tmp_path, monkeypatch):
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": {kind: {"best": 0.1}}}, tmp_path / "ldm.ckpt")
    assert torch.equal(state_dict_of(read_torch_file(tmp_path / "ldm.ckpt"))["a"], torch.ones(1))


def test_writing_is_atomic(tmp_path):
    write_torch_file(tmp_path / "a.pt", {"x": torch.ones(1)})

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("disk full")

    with pytest.raises(OSError, match="the previous file is intact"):
        write_torch_file(tmp_path / "a.pt", {"x": Unpicklable()})
    assert read_torch_file(tmp_path / "a.pt")["x"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]



def one_line(path, message):
    begun = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        read_torch_file(path)
    assert path.name in str(error.value) and "\n" not in str(error.value)
    assert time.monotonic() - begun < 20


def test_a_tree_that_unfolds_without_end_is_read_once(tmp_path):
    """Thirty lists, each ten times in the next: 10^30 values written out."""
    tree = [torch.ones(2)]
    for _ in range(30):
        tree = [tree] * 10
    torch.save({"opt": tree}, tmp_path / "a.pt")
    begun = time.monotonic()
    content = read_torch_file(tmp_path / "a.pt")["opt"]
    assert time.monotonic() - begun < 20
    assert content[0] is content[9]


def test_a_tree_that_is_too_deep_or_contains_itself_is_refused(tmp_path):
    deep: list = []
    for _ in range(100):
        deep = [deep]
    torch.save({"opt": deep}, tmp_path / "fine.pt")
    read_torch_file(tmp_path / "fine.pt")
    ring: list = [1]
    ring.append(ring)
    torch.save({"opt": ring}, tmp_path / "ring.pt")
    one_line(tmp_path / "ring.pt", "refers to itself without end")
    # deeper than Python's own pickler goes: the opcodes by hand, in a torch archive
    torch.save(0, tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "small.pt") as source, zipfile.ZipFile(tmp_path / "deep.pt", "w") as target:
        for entry in source.infolist():
            nested = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
            target.writestr(entry.filename, nested if entry.filename.endswith("data.pkl") else source.read(entry))
    one_line(tmp_path / "deep.pt", "nested too deeply")


def test_a_tensor_that_stands_for_more_than_the_file_holds_is_refused(tmp_path):
    torch.save({"ema": {"w": torch.zeros(1).expand(10**12)}}, tmp_path / "wide.pt")
    one_line(tmp_path / "wide.pt", r"a tensor of shape \(1000000000000,\) stands for more numbers than the file holds")
    torch.save({"ema": {"w": torch.zeros(3, 3).to_sparse()}}, tmp_path / "sparse.pt")
    one_line(tmp_path / "sparse.pt", "sparse")


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, \
         zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target:  # fmt: skip
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    one_line(tmp_path / "bomb.pt", "is compressed, which torch never does")


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"PK\x05\x06" + b"\x00" * 18, b"\x80\x02}q\x00.", b"\x80\x02N.", bytes(1000), b"{}", b"\x80"],
    ids=["empty", "half a zip", "an empty zip", "a bare pickle", "a pickled None", "zeros", "JSON", "one byte"],
)
def test_files_that_are_no_torch_files_are_one_line(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    one_line(tmp_path / "a.pt", "truncated or damaged|refused")


def test_arrays_become_tensors_and_a_pca_its_attributes(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(50, 6))
    pca = PCA(n_components=6).fit(values)
    monkeypatch.setattr(PCA, "__setstate__", None)  # none of its code runs
    torch.save({"pca_model": pca, "mean": values.mean(0), "f": values[0].astype(np.float32)}, tmp_path / "pca.pth")
    tree = read_torch_file(tmp_path / "pca.pth")
    assert np.array_equal(tree["pca_model"]["components_"].numpy(), pca.components_)
    assert np.array_equal(tree["mean"].numpy(), values.mean(0)) and tree["f"].dtype == torch.float32


def test_an_array_of_objects_is_refused(tmp_path):
    torch.save({"mean": np.array([{"a": 1}], dtype=object)}, tmp_path / "a.pth")
    one_line(tmp_path / "a.pth", "refused")
