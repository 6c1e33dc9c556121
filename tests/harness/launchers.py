"""Commands started through real launchers on this machine, and stand-ins for those that need a cluster.

The stand-ins do what the real programs do that the package can see: `srun` starts the tasks of a SLURM step with the
variables of the step and ends all when one fails; `ssh` and `pdsh` run a command of DeepSpeed's launcher "on" hosts
that are all this machine.
"""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
LAUNCHERS_SET = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_")
"""variables that a launcher around the tests may have set"""

SRUN = """
import os, subprocess, sys, time
count = int(os.environ.get("STAND_IN_TASKS", "2"))
step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"}
tasks = [
    subprocess.Popen(sys.argv[1:], env=os.environ | step | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)})
    for n in range(count)
]
while any(task.poll() is None for task in tasks) and not any(task.returncode for task in tasks):
    time.sleep(0.05)
for task in tasks:
    if task.poll() is None and any(other.returncode for other in tasks):
        try:
            task.wait(30)
        except subprocess.TimeoutExpired:
            task.kill()
    task.wait()
sys.exit(next((task.returncode for task in tasks if task.returncode), 0))
"""

PDSH = """
import subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = " ".join(words[words.index("-w") + 2:])
if not command.startswith("export ") or "pkill" in command:
    sys.exit("only the start of ranks is stood in for")
nodes = [subprocess.Popen(["bash", "-c", command.replace("%n", str(n))]) for n in range(len(hosts))]
sys.exit(max(node.wait() for node in nodes))
"""

SSH = """
import sys
print("127.0.0.1" if sys.argv[-2:] == ["hostname", "-I"] else "localhost")
"""


def stand_ins(folder: Path) -> Path:
    """A folder with the programs srun, pdsh and ssh, for the front of PATH."""
    folder.mkdir()
    for name, program in {"srun": SRUN, "pdsh": PDSH, "ssh": SSH}.items():
        path = folder / name
        path.write_text(f"#!{sys.executable}{program}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def clean_environment(*front_of_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS_SET)}
    path = os.pathsep.join([*map(str, front_of_path), str(BIN), kept.get("PATH", "")])
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}


def run_together(
    commands: Sequence[Sequence[object]], *, folder: Path, environment: Mapping[str, str], timeout_s: float = 240
) -> tuple[list[int], str]:
    """(exit codes, output) of commands started together in a folder; what still runs after the time is killed."""
    output = folder / "output"
    with open(output, "w") as file:
        processes = [
            subprocess.Popen(
                list(map(str, command)), cwd=folder, env=dict(environment), stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for command in commands
        ]  # fmt: skip
        for process in processes:
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [process.returncode for process in processes], output.read_text()
