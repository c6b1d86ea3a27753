"""The templates in launch/: what they do with an exit status, and that every flag and key they give exists."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from configs import base, prepare
from sdv_jax import cli
from sdv_jax.train.heartbeat import PEER_LOST
from sdv_jax.train.processes import IO_ERROR, PREEMPTED

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
TEXTS = sorted([*SCRIPTS, *LAUNCH.rglob("*.yaml"), *LAUNCH.rglob("*.md"), ROOT / "docs/many_hosts.md"])


def tools(folder: Path, **scripts: str) -> str:
    """A PATH on which the named programs are these bash scripts; each adds its arguments to folder/calls first."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        program = folder / name
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n{script}\n')
        program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def calls(folder: Path, name: str) -> list[str]:
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return [line for line in lines if line.startswith(f"{name} ")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


# MARK: Slurm


class Slurm:
    """Runs train.sbatch as Slurm would, with an srun that ends with `status` and leaves checkpoint `reached`."""

    def __init__(self, folder: Path):
        self.folder, self.workdir = folder, folder / "run"

    def run(self, status: int, *, reached: int | None = None, requeue: int = 0, gpus: str = "8"):
        leave = f"mkdir -p {self.workdir}/checkpoints/{reached}" if reached is not None else ":"
        ids = f'echo "$JAX_LOCAL_DEVICE_IDS" > {self.folder}/ids'
        path = tools(self.folder / "bin", srun=f"{leave}; {ids}; exit {status}", scontrol=f"exit {requeue}")
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_CPUS_PER_TASK": "64"}
        settings = {"CODE": str(ROOT), "WORKDIR": str(self.workdir)} | ({"SLURM_GPUS_ON_NODE": gpus} if gpus else {})
        return subprocess.run(
            ["bash", LAUNCH / "slurm/train.sbatch", "--config.train.steps=7"],
            env={"PATH": path, **slurm, **settings}, capture_output=True, text=True,
        )  # fmt: skip

    def requeued(self) -> int:
        return len(calls(self.folder / "bin", "scontrol"))


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


@pytest.mark.parametrize("status", [IO_ERROR, PREEMPTED, PEER_LOST, 134, 137, 1])
def test_slurm_queues_a_job_again_that_can_go_on(slurm, status):
    job = slurm.run(status)
    assert job.returncode == 0, job.stdout + job.stderr
    assert calls(slurm.folder / "bin", "scontrol") == ["scontrol requeue 4711"]


@pytest.mark.parametrize("status", [0, 2])
def test_slurm_leaves_what_is_done_or_wrong(slurm, status):
    assert slurm.run(status).returncode == status
    assert slurm.requeued() == 0


def test_slurm_gives_up_when_nothing_comes_of_it(slurm):
    assert [slurm.run(status).returncode for status in (PEER_LOST, IO_ERROR, PEER_LOST)] == [0, 0, PEER_LOST]
    assert slurm.requeued() == 2


def test_slurm_counts_starts_at_one_checkpoint_only(slurm):
    ends = [slurm.run(PEER_LOST, reached=step).returncode for step in (100, 100, 900, 1000, 1000, 1000)]
    assert ends == [0, 0, 0, 0, 0, PEER_LOST]


def test_slurm_never_gives_up_on_preemption(slurm):
    assert [slurm.run(PREEMPTED).returncode for _ in range(5)] == [0] * 5


def test_slurm_says_when_it_cannot_queue_again(slurm):
    job = slurm.run(PREEMPTED, requeue=1)
    assert job.returncode == PREEMPTED
    assert "Slurm did not queue the job again" in job.stdout


def test_slurm_makes_one_process_of_a_node(slurm):
    slurm.run(0)
    assert (slurm.folder / "ids").read_text() == "0,1,2,3,4,5,6,7\n"
    (srun,) = calls(slurm.folder / "bin", "srun")
    assert "--kill-on-bad-exit=0" in srun and "--coordinator auto" in srun and srun.endswith("--config.train.steps=7")
    job = slurm.run(0, gpus="")
    assert job.returncode != 0 and "SLURM_GPUS_ON_NODE: ask Slurm for --gpus-per-node" in job.stderr


def test_slurm_asks_for_what_the_script_relies_on():
    asked = re.findall(r"^#SBATCH (\S+)$", (LAUNCH / "slurm/train.sbatch").read_text(), re.M)
    assert {"--requeue", "--ntasks-per-node=1", "--open-mode=append", "--signal=TERM@300"} <= set(asked)


def test_slurm_prepares_by_the_tasks_of_an_array(tmp_path):
    path = tools(tmp_path, sdv="")
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    command = ["bash", LAUNCH / "slurm/prepare.sbatch", "configs/prepare_pexels.py", "--config.output.path=data/clips"]
    settings = {"PATH": path, "CODE": str(ROOT), "SDV": str(tmp_path / "sdv")}
    subprocess.run(command, env=settings | array, check=True)
    (call,) = calls(tmp_path, "sdv")
    assert call.startswith("sdv prepare --config configs/prepare_pexels.py --config.model.path=")
    assert call.endswith(" --config.output.path=data/clips --process 3/16")


# MARK: GKE


def shown(name: str) -> dict:
    """A template with its settings put in."""
    if shutil.which("envsubst") is None:
        pytest.skip("needs envsubst (package gettext)")
    command = ["bash", LAUNCH / "gke/submit.sh", "--show", LAUNCH / "gke" / name]
    return yaml.safe_load(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("name, hosts, resource", [("gpu", 2, "nvidia.com/gpu"), ("tpu", 4, "google.com/tpu")])
def test_gke_restarts_all_processes_or_none(name, hosts, resource):
    spec = shown(f"train_{name}.yaml")["spec"]
    assert spec["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == hosts
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    (fails,) = job["podFailurePolicy"]["rules"]
    container = job["template"]["spec"]["containers"][0]
    wanted = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert (fails["action"], fails["onExitCodes"]) == ("FailJob", wanted)
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 300
    assert container["resources"]["limits"][resource] in (4, 8)


def test_gke_gpu_processes_know_each_other_without_the_cluster():
    jobset = shown("train_gpu.yaml")
    job = jobset["spec"]["replicatedJobs"][0]
    container = job["template"]["spec"]["template"]["spec"]["containers"][0]
    name, port = jobset["metadata"]["name"], container["ports"][0]["containerPort"]
    # JobSet's host names: JobSet-ReplicatedJob-Job-Pod.JobSet
    assert f"--coordinator={name}-{job['name']}-0-0.{name}:{port}" in container["args"]
    assert {"--processes=2", "--process=$(INDEX)"} <= set(container["args"])
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3,4,5,6,7" and "INDEX" in environment


def test_gke_tpu_processes_ask_the_slice():
    spec = shown("train_tpu.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "--coordinator=auto" in spec["containers"][0]["args"]
    chips = [int(n) for n in spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    assert chips[0] * chips[1] == 4 * spec["containers"][0]["resources"]["limits"]["google.com/tpu"]


def test_gke_prepares_and_stores():
    job = shown("prepare.yaml")["spec"]
    assert job["completions"] == job["parallelism"] == 16
    assert "--process=$(INDEX)/16" in job["template"]["spec"]["containers"][0]["args"]
    assert shown("storage.yaml")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_gke_submit_names_a_setting_that_is_missing(tmp_path):
    template = tmp_path / "x.yaml"
    template.write_text("kind: ${NO_SUCH}\n")
    done = subprocess.run(["bash", LAUNCH / "gke/submit.sh", template], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "submit.sh: NO_SUCH is not set in settings.sh\n")


# MARK: Cloud TPU


@pytest.fixture
def host(tmp_path):
    """`host.sh COMMAND` of a host whose sdv is `script`, without systemd's unit and the share."""
    code = tmp_path / "code"
    shutil.copytree(LAUNCH, code / "launch")
    (code / ".venv").mkdir()

    def command(name: str, *, script: str = "") -> dict:
        path = tools(tmp_path / "bin", sudo="", systemctl="exit 3", mountpoint="exit 1")
        tools(code / ".venv/bin", sdv=script)
        settings = {"PATH": path, "USER": "u", "WORKDIR": str(tmp_path / "run"), "SHARE": "a:/b", "MOUNT": "/c"}
        return {"args": ["bash", code / "launch/tpu/host.sh", name], "env": settings, "text": True}

    return code, command


def test_tpu_host_starts_again_until_it_is_done(host):
    code, command = host
    ends = f'n=$(grep -c "^sdv " {code}/.venv/bin/calls); set -- 75 76 74 0; exit ${{!n}}'
    subprocess.run(**command("loop", script=ends), check=True, capture_output=True)
    assert len(calls(code / ".venv/bin", "sdv")) == 4
    assert (code / ".result").read_text() == "done\n"


def test_tpu_host_that_is_shut_down_hands_it_on_and_is_idle_afterwards(host):
    code, command = host
    waits = "trap 'sleep 0.3; exit 75' TERM; touch $(dirname $0)/up; for _ in {1..200}; do sleep 0.05; done"
    with subprocess.Popen(**command("loop", script=waits), stdout=subprocess.PIPE) as loop:
        while not (code / ".venv/bin/up").exists():
            assert loop.poll() is None
        loop.terminate()
        said = loop.communicate(timeout=20)[0]
    assert "exit status 75, checkpoint 0: ended by SIGTERM" in said
    assert len(calls(code / ".venv/bin", "sdv")) == 1
    assert subprocess.run(**command("status"), capture_output=True).stdout.endswith(": idle\n")


def test_tpu_host_that_was_told_to_stop_says_so_until_it_is_started(host, tmp_path):
    code, command = host
    for told, name in (("stop", "stop"), ("idle", "start")):
        subprocess.run(**command(name), check=True)
        assert subprocess.run(**command("status"), capture_output=True).stdout.endswith(f": {told}\n")
    (code / ".result").write_text("done\n")
    subprocess.run(**command("stop"), check=True)
    assert (code / ".result").read_text() == "done\n"
    stopped, mounted, started, _ = calls(tmp_path / "bin", "sudo")
    assert stopped == "sudo systemctl stop sdv" and mounted == "sudo mount -t nfs -o nconnect=8 a:/b /c"
    assert started.startswith("sudo systemd-run ")


def test_tpu_watch_asks_for_another_tpu_after_a_preemption(tmp_path):
    """NONE, then a TPU that is taken away, then one whose hosts finish."""
    gcloud = f"""
    case "$*" in
    *"queued-resources describe"*) [ -e {tmp_path}/state ] && cat {tmp_path}/state || exit 1 ;;
    *"queued-resources delete"*) rm {tmp_path}/state ;;
    *"queued-resources create"*) echo ACTIVE > {tmp_path}/state; echo x >> {tmp_path}/tpus ;;
    *"host.sh status"*) if [ $(wc -l < {tmp_path}/tpus) = 1 ]; then echo SUSPENDED > {tmp_path}/state; exit 1; fi
        printf 'h0: done\\nh1: done\\n' ;;
    esac"""
    path = tools(tmp_path / "bin", gcloud=gcloud, tar="")
    watch = subprocess.run(
        ["bash", LAUNCH / "tpu/tpu.sh", "watch"],
        env={"PATH": path, "POLL": "0", "NAME": "t", "ZONE": "z", "PROJECT": "p"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert watch.returncode == 0, watch.stdout + watch.stderr
    called = calls(tmp_path / "bin", "gcloud")
    steps = ("create t", "delete t", "host.sh install", "host.sh start")
    assert [sum(step in call for call in called) for step in steps] == [2, 1, 2, 2]
    assert "h0: done, h1: done" in watch.stdout


def test_tpu_install_packs_the_code_without_what_lies_beside_it(tmp_path):
    code, packed = tmp_path / "code", tmp_path / "packed.tar.gz"
    shutil.copytree(LAUNCH, code / "launch")
    there = ("pyproject.toml", "sdv_jax/data/records.py", "sdv_jax/runs/x.py", "tests/data/x.py")
    for name in (*there, "data/x", "runs/x", ".venv/x", ".git/x"):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).touch()
    path = tools(tmp_path / "bin", gcloud=f'[ "$4" = scp ] && cp "$5" {packed} || true')
    environment = {"PATH": path, "NAME": "t", "ZONE": "z", "PROJECT": "p"}
    subprocess.run(["bash", code / "launch/tpu/tpu.sh", "install"], env=environment, check=True, capture_output=True)
    with tarfile.open(packed) as archive:
        found = {str(Path(member.name)) for member in archive if member.isfile()}
    assert {*there, "launch/tpu/host.sh"} <= found
    assert not [name for name in found if name.startswith(("data", "runs", "."))]


@pytest.mark.parametrize(
    ("program", "called", "arguments"),
    [
        ("train", "sdv_jax.training.run_job", ["--config", "configs/small_world_cogvideox.py", "--workdir", "x"]),
        ("prepare", "sdv_jax.data.settings.load", ["--config", "configs/prepare_folder.py"]),
    ],
)
def test_the_launchers_tell_of_a_disk_in_a_line_as_sdv_does(program, called, arguments):
    code = (
        "import runpy, sys; from unittest import mock; "
        f"mock.patch({called!r}, side_effect=FileNotFoundError(2, 'No such file or directory', '/proc/x')).start(); "
        f"sys.argv = {[program, *arguments]!r}; runpy.run_path('launch/{program}.py', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (2, "sdv: error: /proc/x: No such file or directory\n")


# MARK: flags, keys, messages


def keys(config, prefix: str = "") -> set[str]:
    """Every key of a config, with its sections."""
    found = set()
    for name in config:
        found |= {prefix + name} | (keys(config[name], f"{prefix}{name}.") if hasattr(config[name], "keys") else set())
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_config_key_and_file_exists(path):
    known = keys(base.get_config()) | keys(prepare.get_config())
    text = path.read_text()
    assert set(re.findall(r"--config\.([a-z_.]+)=", text)) <= known
    for name in re.findall(r"configs/(\w+)\.py", text):
        importlib.import_module(f"configs.{name}")
    for link in re.findall(r"\]\((\.\./[^)#]+)\)", text):
        assert (path.parent / link).exists(), link


def test_every_flag_exists():
    train, prepare_ = (subcommand_flags(name) for name in ("train", "prepare"))
    for name in ("train_gpu", "train_tpu"):
        job = shown(f"{name}.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
        container = job["template"]["spec"]["containers"][0]
        assert container["args"][0] == "train"
        assert given(container["args"]) <= train
    assert given(shown("prepare.yaml")["spec"]["template"]["spec"]["containers"][0]["args"]) <= prepare_
    for path in TEXTS:
        for command, flags in re.findall(r"(?i)\bsdv\"? (train|prepare) ((?:.*\\\n)*.*)", path.read_text()):
            assert given(re.findall(r"(?<!\S)--[a-z-]+", flags)) <= (train if command == "train" else prepare_), path


def subcommand_flags(name: str) -> set[str]:
    parser = cli._parser().parse_args([name, "--config=x", *(["--workdir=x"] if name == "train" else [])]).parser
    return set(parser._option_string_actions)


def given(arguments: list[str]) -> set[str]:
    return {argument.split("=")[0] for argument in arguments if re.match(r"--(?!config\.)", argument)}


@pytest.mark.parametrize(
    "said",
    [
        "the processes did not find each other through", "rows cannot be cut evenly into", "devices there are",
        "has not been heard of for", "never seen", "going on from the one before it", "the same command resumes",
        "JAX ended this process, as the lines above say: not all processes of the job came",
    ],
)  # fmt: skip
def test_messages_in_the_docs_are_those_of_the_program(said):
    assert said in (ROOT / "docs/many_hosts.md").read_text()
    assert any(said in path.read_text() for path in (ROOT / "sdv_jax").rglob("*.py"))


def test_exit_statuses_in_the_docs_are_those_of_the_program():
    table = (ROOT / "docs/many_hosts.md").read_text()
    ends = {IO_ERROR: "the disk did not take", PREEMPTED: "stopped by SIGTERM", PEER_LOST: "another process died or"}
    for status, said in ends.items():
        assert f"| {status} | {said}" in table
