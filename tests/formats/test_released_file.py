"""Trees of released checkpoints: their weights, and their way into a safetensors file and back."""

from collections import OrderedDict

import pytest
import torch
from omegaconf import DictConfig

from sfd_fast.files.torch_file import PickledConfig
from sfd_fast.formats.released_file import MAX_VALUES, pack_tree, state_dict_of, unpack_tree


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
        ({"ema": {}}, "averaged", "weights 'averaged' is unknown; choose ema or model"),
    ],
)
def test_files_without_the_wanted_weights_are_refused(tree, weights, message):
    with pytest.raises(ValueError, match=message):
        state_dict_of(tree, weights)



@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.module.module."])
def test_wrappers_names_are_dropped_in_any_order_and_number(prefix):
    tree = {"ema": {f"{prefix}blocks.0._orig_mod.w": torch.ones(1), f"{prefix}b": torch.zeros(1)}}
    assert list(state_dict_of(tree)) == ["blocks.0.w", "b"]


def test_names_that_fall_together_without_their_wrappers_are_refused():
    with pytest.raises(ValueError, match="two weights are called 'w'"):
        state_dict_of({"ema": {"module.w": torch.ones(1), "_orig_mod.w": torch.zeros(1)}})


def test_a_weight_without_a_name_is_refused():
    with pytest.raises(ValueError, match="weights entry '3' is a Tensor, not a tensor with a name"):
        state_dict_of({"ema": {3: torch.ones(1)}})


def test_a_tree_that_unfolds_without_end_is_not_packed():
    tree = [1]
    for _ in range(30):
        tree = [tree] * 10
    with pytest.raises(ValueError, match=f"more than {MAX_VALUES} values .* keep_training_state=False"):
        pack_tree(tree, {})
