"""Released YAML files are told by their keys and become the settings of the command that is given them."""

import subprocess
import sys

import pytest
import yaml
from formats.test_released_config import RELEASED

from sfd_fast.cli import parse
from sfd_fast.config import SemVAETrainingConfig, SFDConfig, from_dict, to_dict
from sfd_fast.formats.released_commands import DIFFUSION, SEMVAE, TOKENIZER, released_kind, settings_for

SEMVAE_FILE = yaml.safe_load("""
model: {arch: transformer, variational: true, bottleneck_dim: 16, params: {hidden_dim: 768, transformer_heads: 6}}
data: {model_name: dinov2_vitb14_reg, train_path: features, batch_size: 64}
training:
  mixed_precision: bf16
  total_iterations: 1000000
  max_epochs: 100
  optimizer: {type: AdamW, lr: 0.00005}
  scheduler: {warmup_steps: 500, constant_steps: 800000}
  loss: {mse_weight: 1.0, l1_weight: 0.0, cos_weight: 1.0, kl_weight: 0.0000001}
  checkpointing: {save_every: 20000, checkpoint_dir: out/semvae}
  evaluation: {eval_every: 5000, output_dir: out/eval}
  log: {log_every: 100, log_dir: out/log}
""")
TOKENIZER_FILE = {"ckpt_path": "vae.ckpt", "model": {"target": "ldm.KL", "params": {"ddconfig": {"ch": 128}}}}


def test_kinds_are_told_by_their_keys():
    assert released_kind(RELEASED) == DIFFUSION
    assert released_kind(SEMVAE_FILE) == SEMVAE
    assert released_kind(TOKENIZER_FILE) == TOKENIZER


def test_our_own_files_are_none_of_them():
    for tree in (to_dict(SFDConfig()), to_dict(SemVAETrainingConfig()), {"model": "FOLDER", "num_images": 4},
                 {"preset": "XL"}, {}, [1], None, {"model": {"depth": 2}}):  # fmt: skip
        assert released_kind(tree) is None


def test_a_training_file_is_our_configuration():
    settings, ignored = settings_for("train", RELEASED, "a.yaml")
    config = from_dict(SFDConfig, settings)
    assert (config.optimizer.lr, config.train.max_steps, config.transport.delta_t) == (2e-4, 4_000_000, 0.3)
    assert any(line.startswith("ckpt_path") for line in ignored)


def test_a_semvae_file_is_the_released_recipe():
    """docs/METHOD.md 2: AdamW 5e-5, decay 0.01, 500 warm-up steps from 1 %, 800k constant, cosine to 10 %, batch 64."""
    config = from_dict(SemVAETrainingConfig, settings_for("train-semvae", SEMVAE_FILE, "a.yaml")[0])
    optimizer, default = config.optimizer, SemVAETrainingConfig()
    assert optimizer == default.optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (5e-5, 0.01)
    assert (optimizer.warmup_steps, optimizer.warmup_start) == (500, 0.01)
    assert (optimizer.decay_start, optimizer.final_lr_ratio) == (800_500, 0.1)
    assert (config.train.max_steps, config.train.global_batch_size, config.train.precision) == (1_000_000, 64, "parity")
    assert (config.run.out, config.run.checkpoint_every, config.run.keep_checkpoints) == ("out/semvae", 20_000, 0)
    assert config.semvae.cosine_axis == "tokens"
    assert {**vars(config.semvae), "cosine_axis": "features"} == vars(default.semvae)


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("loss", {"l1_weight": 0.5}, "training.loss.l1_weight: 0.5 is not supported; only 0.0 is"),
        ("loss", {"classification_weight": 0.1}, "classification_weight: 0.1 is not supported"),
        ("optimizer", {"type": "SGD"}, "optimizer AdamW or Adam, not SGD"),
        ("mixed_precision", "fp8", "mixed_precision: fp8 is unknown; known: no, bf16, fp16"),
    ],
)
def test_semvae_settings_that_would_be_computed_otherwise_are_refused(place, value, message):
    tree = SEMVAE_FILE | {"training": SEMVAE_FILE["training"] | {place: value}}
    with pytest.raises(ValueError, match=message):
        settings_for("train-semvae", tree, "a.yaml")


@pytest.mark.parametrize(
    "command, tree, message",
    [
        ("train", SEMVAE_FILE, "a.yaml is a released .* for SemVAE's training: use it with `sfd train-semvae`"),
        ("train-semvae", RELEASED, "use it with `sfd train` or `sfd sample`, not `sfd train-semvae`"),
        ("train", TOKENIZER_FILE, "a.yaml describes a tokenizer of the released system, which needs no settings here"),
        ("encode", TOKENIZER_FILE, "a.yaml describes a tokenizer"),
    ],
)
def test_files_for_another_command_are_refused_by_their_kind(command, tree, message):
    with pytest.raises(ValueError, match=message):
        settings_for(command, tree, "a.yaml")


def test_settings_are_read_without_torch():
    code = "import sys, sfd_fast.formats.released_commands; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_take_released_files_and_flags_win(tmp_path, capsys):
    (tmp_path / "sfd.yaml").write_text(yaml.safe_dump(RELEASED).replace("lr: 0.0002", "lr: 1e-4"))
    (tmp_path / "semvae.yaml").write_text(yaml.safe_dump(SEMVAE_FILE))
    config = parse("train", ["--config", str(tmp_path / "sfd.yaml"), "--train.max_steps", "7"])
    assert (config.optimizer.lr, config.train.max_steps, config.transport.delta_t) == (1e-4, 7, 0.3)
    assert "sfd.yaml: released settings without a counterpart here: " in capsys.readouterr().err
    config = parse("sample", ["--config", str(tmp_path / "sfd.yaml"), "--model", "FOLDER", "--num_images", "3"])
    assert (config.model, config.num_images, config.solver, config.time_grid) == ("FOLDER", 3, "dopri5", "released")
    config = parse("train-semvae", ["--config", str(tmp_path / "semvae.yaml")])
    assert config.semvae.cosine_axis == "tokens"
    with pytest.raises(ValueError, match="semvae.yaml is a released configuration for SemVAE's training"):
        parse("train", ["--config", str(tmp_path / "semvae.yaml")])
