"""The command `sfd`: one table of commands; every field of a command's configuration is a flag and a YAML key."""

import contextlib
import dataclasses
import difflib
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml

from sfd_fast import __version__
from sfd_fast.config import from_dict, require, to_dict
from sfd_fast.config.checks import flatten, grouped, merged
from sfd_fast.config.command_line import build_parser, flags, from_text, read_file, read_words
from sfd_fast.config.presets import ENCODE_DEFAULTS, FEATURES_DEFAULTS, MODEL_DEFAULTS
from sfd_fast.config.recipes import RECIPES, recipe
from sfd_fast.config.run import PREEMPTED
from sfd_fast.formats.released_commands import released_kind, settings_for


@dataclass(frozen=True)
class Command:
    """A configuration dataclass and the function that takes it, both as "module:name", imported when chosen."""

    config: str
    run: str
    summary: str
    presets: dict[str, dict] = dataclasses.field(default_factory=dict)
    """what --preset chooses from: defaults of options by the preset's name; empty: no --preset"""
    positional: str = ""
    """the option that a word without a flag gives"""
    recipes: bool = False
    """offer --recipe; --preset fills in its hyper-parameters too"""
    resumes: bool = False
    """SIGTERM and SIGUSR1 end it with PREEMPTED from its first moment on: started again, it goes on"""
    fill: str = ""
    """"module:name" of what gives further defaults, above a preset: {full key: value}, from the settings given"""
    short: dict[str, str] = dataclasses.field(default_factory=dict)
    """short names of options: {short: full}"""


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "sfd_fast.commands.demo:DemoConfig", "sfd_fast.commands.demo:run_demo",
        "everything once on embedded images: train all parts, sample, judge, draw (about three minutes on a CPU)",
    ),
    "features": Command(
        "sfd_fast.commands.features:FeaturesConfig", "sfd_fast.commands.features:run_features",
        "images to shards of VFM features, what train-semvae reads", presets=FEATURES_DEFAULTS,
    ),
    "train-semvae": Command(
        "sfd_fast.commands.train_semvae:TrainSemVAEOptions", "sfd_fast.commands.train_semvae:run",
        "train the semantic autoencoder on VFM features", resumes=True,
        short={"out": "run.out", "max_steps": "train.max_steps", "deepspeed_config": "deepspeed.config_file"},
    ),
    "encode": Command(
        "sfd_fast.commands.encode:EncodeConfig", "sfd_fast.commands.encode:run_encode",
        "images to shards of composite latents with their statistics, what train reads", presets=ENCODE_DEFAULTS,
    ),
    "inspect": Command(
        "sfd_fast.commands.inspect:InspectConfig", "sfd_fast.commands.inspect:run_inspect",
        "what a cache of features or latents holds, with a picture", positional="path",
    ),
    "train": Command(
        "sfd_fast.commands.train:TrainOptions", "sfd_fast.commands.train:run", "train the diffusion transformer",
        presets=MODEL_DEFAULTS, recipes=True, resumes=True, fill="sfd_fast.commands.train:sizes_of_cache",
        short={
            "out": "run.out", "max_steps": "train.max_steps", "init_from": "train.init_from",
            "deepspeed_config": "deepspeed.config_file",
        },
    ),
    "plan": Command(
        "sfd_fast.commands.plan:PlanConfig", "sfd_fast.commands.plan:run_plan",
        "memory per GPU and a lower bound of step time, before renting the GPUs", presets=MODEL_DEFAULTS,
    ),
    "sample": Command(
        "sfd_fast.commands.sample:SampleConfig", "sfd_fast.commands.sample:run_sample", "generate images"
    ),
    "app": Command(
        "sfd_fast.commands.app:AppConfig", "sfd_fast.commands.app:run_app",
        "a page in the browser to play with a model: classes, guidance, the three stages (pip install 'sfd-fast[app]')",
    ),
    "evaluate": Command(
        "sfd_fast.commands.evaluate:EvaluateConfig", "sfd_fast.commands.evaluate:run_evaluate",
        "FID, sFID, Inception Score, precision, recall and KID of generated images",
    ),
    "download": Command(
        "sfd_fast.commands.download:DownloadConfig", "sfd_fast.commands.download:run_download",
        "the authors' weights in one step: fetched, checked, converted, put together", positional="what",
    ),
    "convert": Command(
        "sfd_fast.commands.convert:ConvertConfig", "sfd_fast.commands.convert:run_convert",
        "released formats to ours and back",
    ),
    "doctor": Command(
        "sfd_fast.commands.doctor:DoctorConfig", "sfd_fast.commands.doctor:run_doctor",
        "what is installed, what is usable here, and how to install the rest",
    ),
}  # fmt: skip


def load(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        f"sfd_fast {__version__}: Semantics-First Diffusion, trained and sampled fast\n\n"
        f"usage: sfd COMMAND [--config FILE.yaml ...] [--key value ...]\n\ncommands:\n{rows}\n\n"
        "`sfd COMMAND --help` lists its options; `--print-config` shows the configuration that would run.\n"
    )


def parse(name: str, argv: list[str]) -> Any:
    """The configuration object of command `name` from its command line: flags above files, files above a preset.

    Raises ValueError or OSError for what is wrong with it; SystemExit(0) after --help and --print-config.
    """
    command = COMMANDS[name]
    kind = load(command.config)
    settings, own = flags(kind), own_flags(command)
    known = {flag: bool if "const" in arguments else str for flag, arguments in own.items()} | settings
    parser = build_parser(
        kind, own, short=command.short, positional=command.positional, prog=f"sfd {name}", description=command.summary,
        usage=f"sfd {name} [--config FILE.yaml ...] [--name value ...]",
    )  # fmt: skip
    words = read_words(argv, parser, known | {"help": bool}, command.short)
    files = [read_file(path, known, partial(of_released, name)) for path in words.get("config", ())]
    named = {key: value for file in files for key, value in file.items() if key in ("preset", "recipe")} | words
    tree: dict[str, Any] = {}
    given = {key: from_text(text, settings[key]) for key, text in words.items() if key in settings}
    layers = [defaults(command, named.get("preset"), named.get("recipe")), *files, given]
    if command.fill:
        told = [flatten(layer) for layer in layers[1:]]
        layers.insert(1, load(command.fill)({key: value for layer in told for key, value in layer.items()}))
    for layer in layers:
        tree = merged(tree, grouped({key: value for key, value in layer.items() if key not in own}))
    config = from_dict(kind, tree)
    if words.get("print_config") == "true":
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def of_released(command: str, content: Any, path: str) -> Any:
    """Settings of the command from a file of the released system; what has no counterpart is said. Ours as it is."""
    if released_kind(content) is None:
        return content
    settings, ignored = settings_for(command, content, path)
    if ignored:
        sys.stderr.write(f"{path}: released settings without a counterpart here: {', '.join(ignored)}\n")
    return settings


def defaults(command: Command, preset: str | None, row: str | None) -> dict[str, Any]:
    """What a preset and its recipe fill in, below files and flags."""
    require(row is None or preset is not None, f"--recipe {row} needs --preset: a recipe is a row of a preset")
    if preset is None:
        return {}
    names = ", ".join(command.presets)
    require(preset in command.presets, f"unknown preset '{preset}'; presets: {names}")
    return command.presets[preset] | (recipe(preset, row).settings() if command.recipes else {})


def own_flags(command: Command) -> dict[str, dict[str, Any]]:
    """Flags that are no settings, as argparse takes them."""
    own: dict[str, dict[str, Any]] = {
        "config": {"action": "append", "metavar": "FILE", "help": "YAML file; repeatable, later files win, flags win"},
        "print_config": {
            "nargs": "?", "const": "true", "metavar": "{true,false}",
            "help": "show the configuration that would run, as YAML for --config",
        },
    }  # fmt: skip
    if command.presets:
        names = ", ".join(command.presets)
        own["preset"] = {"metavar": "NAME", "help": f"defaults below files and flags: {names}"}
    if command.recipes:
        rows = ", ".join(f"{owner} {row}" for owner, row in RECIPES)
        own["recipe"] = {"metavar": "NAME", "help": f"hyper-parameters of the preset: {rows}"}
    return own


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """While inside, a request to stop ends the process with PREEMPTED; the training loop handles it by saving first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            previous[number] = signal.signal(number, lambda *_: sys.exit(PREEMPTED))
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> None:
    """Entry point. User mistakes (ValueError, OSError, ImportError) are one line and exit code 1; bugs keep their
    trace, and SFD_TRACEBACK=1 keeps every trace.
    """
    argv = sys.argv[1:] if argv is None else argv
    # launchers put --local_rank before the command's own flags
    argv = [word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return
    name = argv[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        sys.stderr.write(f"sfd: error: unknown command '{name}'{hint}; commands: {', '.join(COMMANDS)}\n")
        raise SystemExit(2)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sfd_fast").setLevel(logging.INFO)  # what was chosen, once, at start-up
    try:
        with preemptible() if COMMANDS[name].resumes else contextlib.nullcontext():
            config = parse(name, argv[1:])
            result = load(COMMANDS[name].run)(config)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("SFD_TRACEBACK") == "1":
            raise
        sys.stderr.write(f"sfd {name}: error: {' '.join(str(error).splitlines())}\n")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        sys.stderr.write(f"sfd {name}: interrupted\n")
        raise SystemExit(130) from None
    code = getattr(result, "exit_code", 0)  # 75: pre-empted, start again
    if code:
        raise SystemExit(code)
