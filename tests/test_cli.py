"""The command line: every field a flag, files below flags, presets below files, mistakes in one line."""

import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from sfd_fast import cli
from sfd_fast.commands.demo import DemoConfig, diffusion_config
from sfd_fast.config import SFDConfig
from sfd_fast.config.presets import PRESETS, XL, B
from sfd_fast.config.recipes import RECIPES, recipe_names


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    assert stop.value.code != 0
    return capsys.readouterr().err


def test_flags_win_over_files_and_files_over_presets(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model:\n  depth: 5\n  num_classes: 7\ntrain:\n  max_steps: 11\n")
    second.write_text("train:\n  max_steps: 22\n")
    files = ["--config", str(first), "--config", str(second)]
    config = cli.parse("train", ["--preset", "B", *files, "--train.seed=3", "--model.depth", "6"])
    assert isinstance(config, SFDConfig)
    assert (config.model.hidden_size, config.model.depth, config.model.num_classes) == (B.hidden_size, 6, 7)
    assert (config.train.max_steps, config.train.seed) == (22, 3)


def test_a_file_may_name_the_preset(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("preset: B\nmodel:\n  depth: 3\n")
    config = cli.parse("train", ["--config", str(file)])
    assert (config.model.hidden_size, config.model.depth) == (B.hidden_size, 3)


def test_the_default_model_is_xl_and_dashes_serve_as_underscores():
    config = cli.parse("train", ["--train.max-steps", "5"])
    assert config.model == XL
    assert config.train.max_steps == 5


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_that_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert cli.COMMANDS[name].summary.split()[0] in text
    assert "--config" in text


def test_print_config_shows_what_would_run(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--preset", "B", "--train.seed", "9", "--print-config"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "hidden_size: 768" in out
    assert "seed: 9" in out


def test_an_unknown_flag_names_the_nearest(capsys):
    assert "did you mean 'model.depth'?" in refused(capsys, "train", "--model.deptg", "3")


def test_an_unknown_key_of_a_file_names_the_nearest(tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("train:\n  max_stps: 5\n")
    assert "did you mean 'train.max_steps'?" in refused(capsys, "train", "--config", str(file))


@pytest.mark.parametrize(
    "content, nearest",
    [("optimizer:\n  learning: 1\n", "optimizer.lr"), ("optimizer:\n  lrate: 1\n", "optimizer."),
     ("optimiser:\n  lr: 1\n", "optimizer.lr"), ("sampler:\n  num_step: 3\n", "sampler.num_inference_steps")],
)  # fmt: skip
def test_an_unknown_key_always_names_one_of_its_section(tmp_path, capsys, content, nearest):
    file = tmp_path / "a.yaml"
    file.write_text(content)
    assert f"did you mean '{nearest}" in refused(capsys, "train", "--config", str(file))


def test_a_file_that_is_no_yaml_is_one_line(tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("optimizer: [\n")
    error = refused(capsys, "train", "--config", str(file))
    assert "a.yaml is no valid YAML" in error
    assert error.count("\n") == 1


def test_a_contradiction_is_one_line(capsys):
    error = refused(capsys, "train", "--model.patch_size", "3")
    assert "grid_size 16 must be divisible by patch_size 3" in error
    assert "Traceback" not in error


def test_an_unknown_command_names_the_nearest(capsys):
    assert "did you mean 'train'" in refused(capsys, "trian")


def test_an_unknown_preset_lists_the_presets(capsys):
    assert "presets: S, B, L, XL" in refused(capsys, "train", "--preset", "XXXL")


def test_without_a_command_the_commands_are_listed(capsys):
    cli.main([])
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


def test_a_switch_needs_no_value():
    assert cli.parse("sample", ["--show-stages", "--num_images", "3"]).show_stages is True
    assert cli.parse("sample", ["--num_images", "3", "--show-stages"]).show_stages is True
    assert cli.parse("sample", ["--show-stages", "false"]).show_stages is False
    assert cli.parse("train", ["--train.compile"]).train.compile is True


@pytest.mark.parametrize(
    "argv",
    [["runs/latents"], ["--path", "runs/latents"], ["runs/latents", "--verify", "--num-images", "3"],
     ["--verify", "runs/latents"], ["--verify", "true", "runs/latents"], ["--num_images=3", "runs/latents"],
     ["--picture", "a.png", "runs/latents", "--verify"]],
)  # fmt: skip
def test_inspect_takes_its_path_with_or_without_a_flag(argv):
    config = cli.parse("inspect", argv)
    assert config.path == "runs/latents"
    assert config.verify == any(word.startswith("--verify") for word in argv)


def test_a_word_too_many_is_refused(capsys):
    assert "unrecognized arguments: b" in refused(capsys, "inspect", "a", "b").lower()
    assert "unrecognized arguments: a" in refused(capsys, "doctor", "a").lower()


def test_a_missing_cache_is_one_clear_line(tmp_path, capsys):
    error = refused(capsys, "inspect", str(tmp_path / "nowhere"))
    message = f"{tmp_path / 'nowhere'} does not exist; a cache is a folder of *.safetensors"
    assert message in error and "Errno" not in error


def test_the_released_data_settings_are_one_flag_below_files_and_flags(tmp_path, capsys):
    """docs/METHOD.md 2. Features: shorter side 256, centre 224, fp16, no flips. Latents: ADM crop, fp32, both flips."""
    features = cli.parse("features", ["--preset", "imagenet256"])
    found = (features.image_size, features.crop, features.flip, features.storage, features.grid_size, features.vfm)
    assert found == (224, "resize", False, "fp16", 16, "dinov2-b")
    latents = cli.parse("encode", ["--preset", "imagenet256"])
    found = (latents.image_size, latents.crop, latents.flip, latents.storage, latents.posterior, latents.vfm)
    assert found == (256, "adm", True, "fp32", "sample", "dinov2-b")
    file = tmp_path / "a.yaml"
    file.write_text("preset: imagenet256\nstorage: bf16\n")
    mixed = cli.parse("features", ["--config", str(file), "--image-size", "112"])
    assert (mixed.storage, mixed.image_size, mixed.crop) == ("bf16", 112, "resize")
    assert "presets: imagenet256" in refused(capsys, "encode", "--preset", "XL")
    for command in ("features", "encode"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "imagenet256" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "row"), RECIPES)
def test_every_recipe_makes_a_configuration(name, row):
    config = cli.parse("train", ["--preset", name, "--recipe", row])
    made = RECIPES[name, row]
    assert config.model == PRESETS[name]
    assert (config.optimizer.lr, config.optimizer.beta2) == (made.lr, made.beta2)
    assert (config.transport.repa_weight, config.transport.repa_mode) == (made.repa_weight, made.repa_mode)
    assert config.train.max_steps == made.max_steps
    assert config.guidance.active == bool(made.guide) == (made.guidance_scale != 1)
    if made.guide:
        assert tuple(made.guide.split()) in RECIPES
    assert made.source


def test_every_preset_has_a_recipe():
    assert all(recipe_names(name) for name in PRESETS)


def test_the_released_rows_hold_the_published_numbers():
    """docs/METHOD.md 4 and 5: 400k and 4M steps, w 1.6 and 1.5; the retraining recipe's lr, beta2, lambda, mode."""
    usual = cli.parse("train", ["--preset", "XL"])
    assert (usual.optimizer.lr, usual.optimizer.beta2, usual.train.max_steps) == (1e-4, 0.999, 400_000)
    assert (usual.guidance.mode, usual.guidance.scale) == ("autoguidance", 1.6)
    long = cli.parse("train", ["--preset", "XXL", "--recipe", "800ep"])
    assert (long.train.max_steps, long.guidance.scale) == (4_000_000, 1.5)
    assert (long.train.engine, long.deepspeed.zero_stage) == ("deepspeed", 1)
    again = cli.parse("train", ["--preset", "XL", "--recipe", "retraining"])
    assert (again.optimizer.lr, again.optimizer.beta2, again.train.max_steps) == (2e-4, 0.95, 400_000)
    assert (again.transport.repa_weight, again.transport.repa_mode) == (0.5, "cos_mse")


def test_the_demo_trains_by_its_own_rows():
    for name in ("DIGITS", "DIGITS_GUIDE"):
        ours = cli.parse("train", ["--preset", name])
        theirs = diffusion_config(DemoConfig(), name, "x", ours.train.max_steps)
        for part in ("model", "optimizer", "transport", "train", "guidance"):
            assert getattr(ours, part) == getattr(theirs, part)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--train.engine", "fsdp"], "sfd train: error: train.engine 'fsdp' is unknown; choose torch or deep"),
        (["train", "--guidance.mode=cgf"], "did you mean 'cfg'?"),
        (["train", "--sampler.num_inference_steps", "4.5"], "sampler.num_inference_steps '4.5' must be a whole number"),
        (["train", "--sampler.num_inference_steps", "1000000000"], "must be in [1, 100000]"),
        (["train", "--optimizer.lr", "nan"], "optimizer.lr nan must be a finite number"),
        (["train", "--optimizer.lr", "fast"], "optimizer.lr 'fast' must be a finite number"),
        (["train", "--train.compile=maybe"], "train.compile 'maybe' must be true or false"),
        (["train", "--optimizer.lr"], "--optimizer.lr needs a value"),
        (["train", "--optimizer.extra_ema_decays", "0.5,x"], "optimizer.extra_ema_decays[1] 'x' must be"),
        (["train", "--train", "{max_steps: 5, sed: 3}"], "unknown key 'train.sed'; did you mean 'train.seed'?"),
        (["convert", "--target", "x"], "source is missing and has no default"),
        (["plan", "--gpu", "h100"], "gpu 'h100' is unknown; choose a100-40g"),
        (["evaluate", "--samples", "a", "--reference", "b", "--metrics", "fid,lpips"], "metrics[1] 'lpips' is unknown"),
        (["sample", "--config", "absent.yaml"], "absent.yaml"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line(capsys, words, message):
    error = refused(capsys, *words)
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  engine: fsdp\n", "a.yaml: train.engine 'fsdp' is unknown"),
        ("sampler:\n  num_inference_steps: 4.5\n", "a.yaml: sampler.num_inference_steps 4.5 must be a whole number"),
        ("optimizer:\n  lr: '1e-4'\n", "a.yaml: optimizer.lr '1e-4' must be a finite number"),
        ("train: 5\n", "train 5 must be a group of settings"),
        ("- train\n", "a.yaml must hold settings as `name: value`"),
        ("a: &a [*a]\n", "a.yaml is no valid YAML: an alias contains itself"),
        ("run:\n  outt: x\n", "a.yaml: unknown setting 'run.outt'; did you mean 'run.out'?"),
        ("1: x\n", "a.yaml: unknown setting '1'"),
    ],
)
def test_a_wrong_value_of_a_file_names_the_file(tmp_path, capsys, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    error = refused(capsys, "train", "--config", str(file))
    assert message in error and error.count("\n") == 1


def test_files_have_the_numbers_of_yaml_1_2_and_may_have_dotted_keys(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("optimizer:\n  lr: 1e-4\n  extra_ema_decays: [0, 9e-1]\ntrain.seed: 5\n")
    config = cli.parse("train", ["--config", str(file)])
    assert (config.optimizer.lr, config.optimizer.extra_ema_decays, config.train.seed) == (1e-4, (0.0, 0.9), 5)


def test_words_become_values_of_every_type():
    words = ["--optimizer.extra_ema_decays", "[0.5, 0.9]", "--guidance.texture_scale", "null", "--train.compile", "yes"]
    config = cli.parse("train", [*words, "--run.tensorboard=no", "--transport.repa_weight", "0", "--data.path", "7"])
    assert config.optimizer.extra_ema_decays == (0.5, 0.9)
    assert (config.guidance.texture_scale, config.train.compile, config.run.tensorboard) == (None, True, False)
    assert config.data.path == "7"
    assert cli.parse("plan", ["--extra_ema_decays", "0.5,0.9", "--gpus", "1"]).extra_ema_decays == (0.5, 0.9)
    assert cli.parse("sample", ["--guidance_mode", "none", "--labels", "1,2"]).guidance_mode == "none"


@pytest.mark.parametrize("words", [["--out=~/x"], ["--run.out", "~/x"]])
def test_the_home_folder_may_be_a_tilde(monkeypatch, tmp_path, words):
    monkeypatch.setenv("HOME", "/home/someone")
    assert cli.parse("train", words).run.out == "/home/someone/x"
    file = tmp_path / "a.yaml"
    file.write_text("out: ~/x\n")
    assert cli.parse("sample", ["--config", str(file)]).out == "/home/someone/x"


def test_the_launchers_rank_flag_is_passed_over(capsys):
    for flag in ("--local_rank=1", "--local-rank=1"):
        with pytest.raises(SystemExit) as stop:
            cli.main([flag, "doctor", "--help"])
        assert stop.value.code == 0


def test_help_and_shown_configurations_load_no_torch():
    """They answer in a moment: nothing heavy is imported for them."""
    code = (
        "import sys, contextlib, io\n"
        "from sfd_fast import cli\n"
        "for words in [*([name, '--help'] for name in cli.COMMANDS), ['--help'], ['train', '--print-config']]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        cli.main(words)\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_offers_its_parts_and_loads_them_when_asked():
    code = (
        "import sys, sfd_fast\n"
        "assert 'numpy' not in sys.modules and set(sfd_fast.__all__) <= set(dir(sfd_fast))\n"
        "from sfd_fast import PRESETS\n"
        "assert 'torch' not in sys.modules and PRESETS['XL'].depth == 28\n"
        "from sfd_fast import LightningDiT, SFDPipeline, SemVAE, load_released, sample, training_loss\n"
        "assert callable(sample) and callable(training_loss) and callable(load_released)\n"
        "try:\n    sfd_fast.nothing\nexcept AttributeError as error:\n    assert 'nothing' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_and_flags_win_over_a_recipe(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("preset: XL\nrecipe: retraining\noptimizer:\n  lr: 3e-4\n")
    config = cli.parse("train", ["--config", str(file), "--transport.repa_weight", "0.7"])
    assert (config.optimizer.lr, config.optimizer.beta2, config.transport.repa_weight) == (3e-4, 0.95, 0.7)


def test_print_config_shows_the_recipe_and_reads_back(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--preset", "XL", "--recipe", "retraining", "--print-config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    assert (shown["optimizer"]["lr"], shown["transport"]["repa_mode"]) == (2e-4, "cos_mse")
    (tmp_path / "shown.yaml").write_text(text)
    again = cli.parse("train", ["--config", str(tmp_path / "shown.yaml")])
    assert again == cli.parse("train", ["--preset", "XL", "--recipe", "retraining"])


def test_a_recipe_that_is_not_there_lists_those_that_are(capsys):
    wrong = refused(capsys, "train", "--preset", "XL", "--recipe", "90ep")
    assert "preset XL has no recipe '90ep'; its recipes: 80ep, 800ep, retraining" in wrong
    assert "--recipe 80ep needs --preset" in refused(capsys, "train", "--recipe", "80ep")


def test_short_flags_serve_as_the_full_ones(tmp_path):
    """The three that the training commands are usually given; a switch among them needs no value."""
    file = tmp_path / "ds.json"
    short = ["--dry-run", "--deepspeed-config", str(file), "--init-from=weights.pt"]
    config = cli.parse("train", short)
    assert (config.dry_run, config.train.init_from) == (True, "weights.pt")
    assert config.deepspeed.config_file == str(file)
    assert config == replace(cli.parse("train", []), dry_run=True, train=config.train, deepspeed=config.deepspeed)
    for command in ("train", "train-semvae"):
        config = cli.parse(command, ["--out", "runs/a", "--max-steps=5"])
        assert (config.run.out, config.train.max_steps) == ("runs/a", 5)


def test_short_flags_are_listed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--deepspeed.config_file TEXT, --deepspeed_config TEXT", "--train.init_from TEXT, --init_from TEXT"):
        assert flag in text


def test_the_cache_tells_the_sizes_of_the_model_unless_they_are_given(tmp_path):
    from harness.tiny_run import write_data

    folder = str(write_data(tmp_path / "cache"))
    model = cli.parse("train", ["--preset", "S", "--data.path", folder]).model
    assert (model.texture_channels, model.semantic_channels, model.grid_size) == (2, 2, 4)
    assert (model.num_classes, model.repa_channels) == (5, 8)
    assert (model.hidden_size, model.depth) == (384, 12)  # the preset's
    assert cli.parse("train", ["--data.path", folder, "--model.num_classes", "7"]).model.num_classes == 7
