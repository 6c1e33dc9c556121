"""Every launch line of README.md and docs/, taken from the text and run through its launcher on two ranks.

A line stays as it is written; a word in capitals that stands for a file is a tiny file of that name, and options that
make the work small are added: the launcher's behind its own, the command's at the end.
"""

import importlib.util
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from harness.launchers import clean_environment, run_together, stand_ins
from harness.tiny_caches import SIZE
from harness.tiny_pipelines import build
from harness.tiny_run import MODEL, write_data
from safetensors import safe_open

from sfd_fast.config import to_dict
from sfd_fast.ranks import free_port
from sfd_fast.sampling.image_writer import is_whole

pytest_plugins = ["harness.cache_fixtures"]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: DS_BUILD_OPS=0 pip install deepspeed==0.19.8",
)
ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("torchrun", "deepspeed", "srun", "sbatch", "accelerate", "mpirun", "mpiexec", "horovodrun")
TRAINING = {
    "model": to_dict(MODEL),
    "train": {"max_steps": 2, "global_batch_size": 8, "precision": "fp32"},
    "run": {
        "out": "run", "log_every": 1, "validate_every": 0, "sample_every": 0, "checkpoint_every": 2,
        "tensorboard": False,
    },
    "data": {"path": "CACHE", "validation_samples": 8},
}  # fmt: skip


class Line(NamedTuple):
    variables: list[str]
    launcher: list[str]
    """the launcher with its own options, up to the module or program"""
    start: list[str]
    """-m sfd_fast, --module sfd_fast, or sfd"""
    command: list[str]
    """the command of sfd and its options"""


def written() -> dict[str, str]:
    """{place: line} of lines in code blocks and of code within a sentence."""
    found = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))):
        text = page.read_text()
        blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
        spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in (*blocks, *(" ".join(span.split()) for span in spans)):
            words = [word for word in line.split(" #")[0].split() if not re.match(r"[A-Z_]+=", word)]
            if len(words) > 1 and words[0] in LAUNCHERS:
                found[f"{page.name}: {' '.join(words)}"] = line.split(" #")[0]
    return found


def read(line: str) -> Line:
    words = [word for word in shlex.split(line) if word != "..."]
    names = [word for word in words if re.match(r"[A-Z_]+=", word)]
    words = words[len(names) :]
    starts = (["-m", "sfd_fast"], ["--module", "sfd_fast"], ["sfd"])
    for at, start in ((at, start) for at in range(1, len(words)) for start in starts):
        if words[at : at + len(start)] == start:
            return Line(names, words[:at], start, words[at + len(start) :])
    assert line.rstrip().endswith("..."), f"neither a command of sfd nor ... in: {line}"
    return Line(names, words, ["--module", "sfd_fast"], ["train", "--preset", "XXL"])


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """What the lines name: tiny settings, a cache, hosts, a pipeline; and the stand-ins of clusters."""
    root = tmp_path_factory.mktemp("lines")
    write_data(root / "CACHE")
    (root / "tiny.yaml").write_text(yaml.safe_dump(TRAINING))
    (root / "HOSTS").write_text("node1 slots=1\nnode2 slots=1\n")
    build().save_pretrained(root / "PIPELINE")
    stand_ins(root / "bin")
    return root


def launchers_of(line: Line) -> list[list[str]]:
    """The launcher's words with what makes two ranks of it here: one launch, or one on each of two nodes."""
    name, port = line.launcher[0], free_port()
    if name == "srun":
        return [line.launcher]
    if name == "torchrun" and "--nnodes" in line.launcher:
        more = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_endpoint", f"localhost:{port}"]
        return [line.launcher + more] * 2
    if name == "torchrun":
        return [[*line.launcher, "--nproc_per_node", "2", "--master_port", port]]
    assert name == "deepspeed", f"no way to run {name} here: add one to this test"
    ranks = [] if "--hostfile" in line.launcher else ["--num_accelerators", "2"]
    return [[*line.launcher, *ranks, "--master_port", port]]


def small(command: str, parts: dict[str, str], out: Path) -> list[str]:
    if command == "train":
        return ["--config", "tiny.yaml"]
    if command == "sample":
        options = {"model": "PIPELINE", "out": out, "num_images": 6, "micro_batch_size": 2, "num_inference_steps": 4}
    else:
        assert command == "encode", f"no small work for {command} here: add it to this test"
        options = parts | {"out": out, "image_size": SIZE, "shard_size": 2, "batch_size": 4}
    return [word for name, value in (options | {"device": "cpu"}).items() for word in (f"--{name}", str(value))]


def check(command: str, out: Path, output: str) -> None:
    """Both ranks took part, and the work is whole."""
    if command == "train":
        states = sorted((out / "checkpoints" / "00000002").glob("state-*.safetensors"))
        assert [path.name for path in states] == ["state-00000.safetensors", "state-00001.safetensors"]
        with safe_open(out / "model" / "model.safetensors", "pt") as file:
            assert file.keys()
    elif command == "sample":
        pictures = sorted((out / "images").glob("*.png"))
        assert [path.stem for path in pictures] == [f"{number:06d}" for number in range(6)]
        assert all(is_whole(path) for path in pictures) and (out / "labels.npy").is_file()  # written by the first rank
    else:
        assert "13 images in 7 shards" in output and "on 2 rank(s)" in output


def test_there_are_lines_of_every_launcher():
    names = [read(line).launcher[0] for line in written().values()]
    assert len(names) >= 8 and {"torchrun", "deepspeed", "srun"} <= set(names)


@pytest.mark.parametrize("line", [pytest.param(line, id=place[:70]) for place, line in written().items()])
def test_a_launch_line_runs_through_its_launcher(line, folder, parts, tmp_path):
    line = read(line)
    command, out = line.command[0], tmp_path / "out"
    own = dict(zip(line.command, line.command[1:])).get("--out")
    more = small(command, parts, out)
    if command == "train":
        out = folder / own if own else out
        more += [] if own else ["--out", str(out)]
    commands = [[*launcher, *line.start, *line.command, *more] for launcher in launchers_of(line)]
    variables = dict(word.split("=", 1) for word in line.variables)
    environment = clean_environment(folder / "bin") | variables
    codes, output = run_together(commands, folder=folder, environment=environment)
    assert codes == [0] * len(commands), output[-5000:]
    check(command, out, output)
