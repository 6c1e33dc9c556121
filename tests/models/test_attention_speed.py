"""Which attention library is taken: the fastest by the clock, measured once, kept on disk, in order where asked."""

import json
import logging

import pytest
import torch

from sfd_fast.models import attention as module
from sfd_fast.models import attention_speed
from sfd_fast.models.attention_speed import fastest, kept_answers, measure

SHAPE, CPU = (2, 8, 3, 16), torch.device("cpu")


class Workshop:
    """Attention libraries that take as many seconds of a false clock as they are given; both passes where asked."""

    def __init__(self, **seconds):
        self.now, self.seconds, self.calls = 0.0, seconds, dict.fromkeys(seconds, 0)

    def clock(self):
        return self.now

    def library(self, name):
        def call(q, k, v):
            self.calls[name] += 1
            if isinstance(self.seconds[name], Exception):
                raise self.seconds[name]
            self.now += self.seconds[name]
            return q * k * v

        return call

    def libraries(self):
        return {name: self.library(name) for name in self.seconds}

    def fastest(self, shape=SHAPE, training=False):
        return fastest(self.libraries(), shape, torch.float32, CPU, training, clock=self.clock)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sfd_fast" / "attention.json"


def test_times_are_the_clocks_for_one_call():
    times = measure(Workshop(slow=0.003, fast=0.001).libraries(), SHAPE, torch.float32, CPU, True)
    assert times.keys() == {"slow", "fast"}
    shop = Workshop(slow=0.003, fast=0.001)
    times = measure(shop.libraries(), SHAPE, torch.float32, CPU, True, clock=shop.clock)
    assert times == {"slow": pytest.approx(3.0), "fast": pytest.approx(1.0)}


def test_a_slow_moment_does_not_decide():
    shop = Workshop(steady=0.002, jumpy=0.001)
    plain, jumps = shop.library("jumpy"), iter([0.5] + [0.0] * 1000)

    def jumpy(q, k, v):
        shop.now += next(jumps) if shop.calls["jumpy"] >= attention_speed.WARM_UPS else 0.0
        return plain(q, k, v)

    calls = {"steady": shop.library("steady"), "jumpy": jumpy}
    assert fastest(calls, SHAPE, torch.float32, CPU, False, clock=shop.clock) == "jumpy"


def test_the_fastest_is_measured_once_and_kept_on_disk(cache):
    assert Workshop(slow=0.003, fast=0.001).fastest() == "fast"
    assert kept_answers() == cache and list(json.loads(cache.read_text()).values()) == ["fast"]
    later = Workshop(slow=0.001, fast=0.003)  # another process, on a day when the clock says otherwise
    assert later.fastest() == "fast" and later.calls == {"slow": 0, "fast": 0}


def test_an_answer_holds_for_its_shape_its_direction_and_its_libraries(cache):
    Workshop(slow=0.003, fast=0.001).fastest()
    assert Workshop(slow=0.001, fast=0.003).fastest(training=True) == "slow"
    assert Workshop(slow=0.001, fast=0.003).fastest(shape=(4, 8, 3, 16)) == "slow"
    assert Workshop(slow=0.003, fast=0.001, new=0.0001).fastest() == "new"
    assert len(json.loads(cache.read_text())) == 4


def test_a_library_that_fails_is_passed_over_and_named(caplog):
    shop = Workshop(broken=RuntimeError("no kernel image is available. Rebuild it."), works=0.001)
    with caplog.at_level(logging.WARNING, "sfd_fast.attention"):
        assert shop.fastest() == "works"
    assert "'broken' does not run here and is passed over: no kernel image is available" in caplog.text


def test_a_damaged_file_of_answers_is_measured_again(cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("{half")
    assert Workshop(slow=0.003, fast=0.001).fastest() == "fast"
    assert "is not readable" in caplog.text and list(json.loads(cache.read_text()).values()) == ["fast"]


def test_a_home_that_cannot_be_written_costs_only_the_memory(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Workshop(slow=0.003, fast=0.001).fastest() == "fast"
    assert "the measured choice is not kept" in caplog.text


def test_auto_measures_among_what_fits_and_a_named_library_is_not_questioned(monkeypatch):
    """A GPU is pretended: its device asks for tensors of a type that torch has not here, so the choice is asked."""
    asked = []

    def pretend(calls, shape, dtype, device, training):
        asked.append((sorted(calls), shape, dtype, device.type, training))
        return "cudnn"

    monkeypatch.setattr(module, "fastest", pretend)
    monkeypatch.setattr(module, "_capability", lambda device_type: 9)
    monkeypatch.setattr(module, "_not_installed", lambda name: "" if name in ("sdpa", "cudnn") else "is absent")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choice = module._remembered_choice.__wrapped__
    key = (torch.device("cuda", 0), torch.bfloat16, (32, 256, 16, 72), True, False)
    assert choice("auto", *key) == "cudnn"
    assert asked == [(["cudnn", "sdpa"], (32, 256, 16, 72), torch.bfloat16, "cuda", True)]
    assert choice("sdpa", *key) == "sdpa" and len(asked) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # a graph must not record a clock
    assert choice("auto", *key) == "sdpa" and len(asked) == 1


def test_one_candidate_is_taken_unmeasured(monkeypatch):
    monkeypatch.setattr(module, "fastest", None)
    monkeypatch.setattr(module, "cpu_instruction_set", lambda: "avx2")
    key = (CPU, torch.float32, SHAPE, True, False)
    assert module._remembered_choice.__wrapped__("auto", *key) == "sdpa"


def test_deterministic_training_takes_only_what_sums_in_order(monkeypatch):
    monkeypatch.setattr(module, "_capability", lambda device_type: 9)
    monkeypatch.setattr(module, "_not_installed", lambda name: "")
    assert module.candidates("cuda", torch.bfloat16, 72) == ["flash3", "flash4", "flash2", "sdpa", "cudnn"]
    torch.use_deterministic_algorithms(True)
    try:
        assert module.candidates("cuda", torch.bfloat16, 72) == ["flash2", "sdpa"]
        with pytest.raises(ValueError, match="'cudnn': cuDNN.* sums in a fixed order"):
            module.choose("cudnn", "cuda", torch.bfloat16, 72)
    finally:
        torch.use_deterministic_algorithms(False)


def test_cudnns_attention_is_the_formula_with_the_backend_pinned(monkeypatch):
    """Where cuDNN is absent torch says that no kernel is available: the pin reached it."""
    q, k, v = (torch.randn(2, 8, 3, 16) for _ in range(3))
    with pytest.raises(RuntimeError, match="[Nn]o (available|viable) (kernel|backend)"):
        module._call_cudnn(q, k, v)
