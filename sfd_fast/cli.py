"""The command `sfd`: one table of commands; every field of a command's configuration is a flag and a YAML key."""

import dataclasses
import difflib
import importlib
import logging
import os
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from sfd_fast import __version__
from sfd_fast.config import require
from sfd_fast.config.checks import annotations, unmarked
from sfd_fast.config.presets import ENCODE_DEFAULTS, FEATURES_DEFAULTS, MODEL_DEFAULTS
from sfd_fast.config.recipes import RECIPES, recipe


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
        "train the semantic autoencoder on VFM features",
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
        presets=MODEL_DEFAULTS, recipes=True,
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
    "convert": Command(
        "sfd_fast.commands.convert:ConvertConfig", "sfd_fast.commands.convert:run_convert",
        "released formats to ours and back",
    ),
    "doctor": Command(
        "sfd_fast.commands.doctor:DoctorConfig", "sfd_fast.commands.doctor:run_doctor",
        "what is installed, what is usable here, and how to install the rest",
    ),
}  # fmt: skip


class Parser(ArgumentParser):
    """Errors are one line that names the nearest valid option."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        keys = [a.dest for a in self._actions if a.dest not in ("help", "config", "print_config")]
        mistyped = unknown_key(message)
        near = None if mistyped is None else nearest_key(mistyped, keys)
        if near:
            message += f"\n  did you mean '{near}'?"
        sys.stderr.write(f"{self.prog}: error: {message}\n  all options: {self.prog} --help\n")
        raise SystemExit(2)


def unknown_key(message: str) -> str | None:
    """The key that jsonargparse does not know, read from its message; None where it complains about something else."""
    for pattern in (
        r"unrecognized arguments: --([\w.-]+)",
        r"Group '(?P<group>[\w.]+)' does not accept option '([\w.-]+)'",
        r"Option '([\w.-]+)' is not accepted",
    ):
        found = re.search(pattern, message)
        if found:
            group = found.groupdict().get("group")
            key = found[found.re.groups].replace("-", "_")
            return f"{group}.{key}" if group else key
    return None


def nearest_key(name: str, keys: list[str]) -> str | None:
    """The valid key closest to a mistyped one: by its full path, then by its last word, then whatever is least far."""
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0.75)
    if close:
        return close[0]
    last = {key.rsplit(".", 1)[-1]: key for key in keys}
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1, cutoff=0.7)
    if close:
        return last[close[0]]
    group = name.rpartition(".")[0]
    within = [key for key in keys if group and key.startswith(f"{group}.")]
    close = difflib.get_close_matches(name, within or keys, n=1, cutoff=0.0)
    return close[0] if close else None


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


def chosen(option: str, argv: list[str]) -> str | None:
    """What the command line names as --preset or --recipe, or else the last configuration file that names one."""
    name = None
    for i, word in enumerate(argv):
        key, _, value = word.partition("=")
        value = value or (argv[i + 1] if i + 1 < len(argv) else "")
        if key == f"--{option}":
            return value
        if key == "--config" and os.path.isfile(value):
            with open(value) as file:
                try:
                    content = yaml.safe_load(file)
                except yaml.YAMLError as error:
                    raise ValueError(f"{value} is no valid YAML: {' '.join(str(error).split())}") from None
            if isinstance(content, dict):
                name = content.get(option, name)
    return name


def build_parser(name: str, argv: list[str]) -> Parser:
    """The parser of one command; a preset and its recipe become the defaults, below files and flags."""
    command = COMMANDS[name]
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    kind = load(command.config)
    short = ", ".join(f"--{word.replace('_', '-')} (--{full})" for word, full in command.short.items())
    parser = Parser(prog=f"sfd {name}", description=command.summary + (f". Short flags: {short}" if short else ""))
    parser.add_argument("--config", action="config", help="YAML file; repeatable, later files and flags win")
    parser.add_class_arguments(kind)
    if command.presets:
        names = ", ".join(command.presets)
        parser.add_argument("--preset", type=str, default=None, help=f"defaults below files and flags: {names}")
        preset = chosen("preset", argv)
        if preset is not None:
            require(preset in command.presets, f"unknown preset '{preset}'; presets: {names}")
            parser.set_defaults(command.presets[preset])
    if command.recipes:
        rows = ", ".join(f"{owner} {row}" for owner, row in RECIPES)
        parser.add_argument("--recipe", type=str, default=None, help=f"hyper-parameters of the preset: {rows}")
        row = chosen("recipe", argv)
        require(row is None or preset is not None, f"--recipe {row} needs --preset: a recipe is a row of a preset")
        if preset is not None:
            parser.set_defaults(recipe(preset, row).settings())
    return parser


def parse(name: str, argv: list[str]) -> Any:
    """The configuration object of command `name` from its command line."""
    command = COMMANDS[name]
    switches = bool_keys(load(command.config))
    argv = [in_full(normalized(word), command.short) for word in argv]
    if command.positional:
        argv = with_positional(argv, command.positional, switches)
    argv = with_values(argv, switches)
    parser = build_parser(name, argv)
    values = parser.parse_args(argv)
    for key in ("config", "preset", "recipe"):
        values.pop(key, None)
    return load(command.config)(**vars(parser.instantiate(values)))


def normalized(word: str) -> str:
    """--max-steps is --max_steps; values are left alone."""
    if not word.startswith("--"):
        return word
    key, equals, value = word[2:].partition("=")
    return "--" + key.replace("-", "_") + equals + value


def in_full(word: str, short: dict[str, str]) -> str:
    """--init_from is --train.init_from, where the command has such a short name."""
    key, equals, value = word.removeprefix("--").partition("=")
    return f"--{short[key]}{equals}{value}" if word.startswith("--") and key in short else word


def bool_keys(kind: type, prefix: str = "") -> set[str]:
    """Paths of the true-or-false fields of a dataclass tree."""
    keys = set()
    for name, annotation in annotations(kind).items():
        held = unmarked(annotation)[0]
        if dataclasses.is_dataclass(held):
            keys |= bool_keys(held, f"{prefix}{name}.")
        elif held is bool:
            keys.add(prefix + name)
    return keys


def with_positional(argv: list[str], option: str, switches: set[str]) -> list[str]:
    """The first word that is neither a flag nor the value of one becomes the value of `option`."""
    for i, word in enumerate(argv):
        before = argv[i - 1] if i else ""
        is_value = before.startswith("--") and "=" not in before
        if is_value and before[2:] in switches:
            is_value = word.lower() in ("true", "false", "yes", "no")
        if not word.startswith("-") and not is_value:
            return [*argv[:i], f"--{option}={word}", *argv[i + 1 :]]
    return argv


def with_values(argv: list[str], switches: set[str]) -> list[str]:
    """A switch without a value (--show_stages) means true."""
    following = [*argv[1:], "--"]
    return [
        f"{word}=true" if word[2:] in switches and word[:2] == after[:2] == "--" else word
        for word, after in zip(argv, following)
    ]


def main(argv: list[str] | None = None) -> None:
    """Entry point. User mistakes (ValueError, OSError, ImportError) are one line and exit code 1; bugs keep their
    trace, and SFD_TRACEBACK=1 keeps every trace.
    """
    argv = sys.argv[1:] if argv is None else argv
    # launchers put --local_rank before the command's own flags
    argv = [word for word in argv if not word.startswith("--local_rank=")]
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
        config = parse(name, argv[1:])
        result = load(COMMANDS[name].run)(config)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("SFD_TRACEBACK") == "1":
            raise
        sys.stderr.write(f"sfd {name}: error: {error}\n")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        sys.stderr.write(f"sfd {name}: interrupted\n")
        raise SystemExit(130) from None
    code = getattr(result, "exit_code", 0)  # 75: pre-empted, start again
    if code:
        raise SystemExit(code)
