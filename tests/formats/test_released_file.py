"""Torch files of the released system: safe reading, damage, the tree and its way back."""

import builtins
import importlib
import os
import pickle
import shutil
import subprocess
from collections import OrderedDict

import pytest
import torch
from harness.support import GOLDEN
from omegaconf import DictConfig, OmegaConf

from sfd_fast.formats.released_file import (
    PickledConfig,
    pack_tree,
    read_torch_file,
    state_dict_of,
    unpack_tree,
    write_torch_file,
)

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


def test_every_kind_of_plain_data_survives_packing():
    tree = {
        "tuple": (1, 2.5, None, True, "text"), "list": [[1], {"a": (2,)}], 3: {0.5: "number keys"},
        "empty": [{}, (), []], "float": 0.1 + 0.2, "ordered": OrderedDict(b=1, a=2),
        "config": PickledConfig(a={"b": [1]}), "tensors": [torch.arange(3), torch.tensor(2.0), torch.zeros(0, 2)],
    }  # fmt: skip
    tree["ordered"]._metadata = {"": {"version": 1}}
    text, tensors = pack_tree(tree, {})
    assert same(unpack_tree(text, tensors, {}), tree)


def test_known_tensors_are_referred_to_and_not_stored_twice():
    weights = OrderedDict(w=torch.randn(4))
    text, tensors = pack_tree({"ema": weights, "model": {"w": torch.randn(4)}}, {"w": weights["w"]})
    assert list(tensors) == ["/model/w"]
    assert unpack_tree(text, tensors, {"w": weights["w"]})["ema"]["w"] is weights["w"]


def test_objects_that_cannot_be_kept_are_named():
    with pytest.raises(ValueError, match="'opt/x' is a set: .* keep_training_state=False"):
        pack_tree({"opt": {"x": {1}}}, {})


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


def test_ema_and_raw_weights_are_told_apart_and_prefixes_dropped():
    tree = {"model": {"module._orig_mod.w": torch.zeros(1)}, "ema": {"w": torch.ones(1)}}
    assert state_dict_of(tree)["w"] == 1
    assert state_dict_of(tree, "model")["w"] == 0


@pytest.mark.parametrize(
    "tree, weights, message",
    [
        ([1], "ema", "a checkpoint is a dictionary; this file holds a list"),
        ({"model": {"w": torch.ones(1)}}, "ema", "the file has no 'ema' weights; its entries are: model"),
        ({"ema": {"w": 3}}, "ema", "weights entry 'w' is a int, not a tensor"),
        ({}, "ema", "the file has no 'ema' weights"),
        ({"ema": {}}, "averaged", "weights 'averaged' is unknown; allowed: ema, model"),
    ],
)
def test_files_without_the_wanted_weights_are_refused(tree, weights, message):
    with pytest.raises(ValueError, match=message):
        state_dict_of(tree, weights)


def test_writing_is_atomic(tmp_path):
    write_torch_file(tmp_path / "a.pt", {"x": torch.ones(1)})

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("disk full")

    with pytest.raises(OSError, match="the previous file is intact"):
        write_torch_file(tmp_path / "a.pt", {"x": Unpicklable()})
    assert read_torch_file(tmp_path / "a.pt")["x"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
