"""Processes find one another as people start them, or are refused; one works for all."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import pytest
import yaml

from lm_jax import preflight, processes, together
from lm_jax.config import Config, ConfigError, replace, rules
from tests.helpers import ROOT

JOB = {"SLURM_JOB_ID": "70001", "SLURM_NTASKS": "16", "SLURM_GTIDS": "0"}  # of a batch script
STEP = JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[007-008]-ib,other[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
}
NODES = STEP | {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
BY_HAND = {
    "JAX_COORDINATOR_ADDRESS": "host0:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}
SKY = {
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
TORCHRUN = {
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "16",
    "RANK": "9",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
}
OF_OTHERS = (
    "JAX_ SLURM OMPI PMI SKYPILOT WORLD_SIZE RANK LOCAL_ MASTER_ TORCHELASTIC JOB_ CUDA_ XLA_"
).split()


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


@pytest.fixture
def started(monkeypatch):
    """Sets the environment of a process, and returns what is passed to jax.distributed."""
    calls = []

    def initialize(**options):
        calls.append(options)

    def start(variables, gpus=8):
        for name in list(os.environ):
            if name.startswith(tuple(OF_OTHERS)):
                monkeypatch.delenv(name)
        devices = ",".join(map(str, range(gpus)))
        for name, value in ({"CUDA_VISIBLE_DEVICES": devices} | variables).items():
            monkeypatch.setenv(name, value)
        return calls

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return start


@pytest.mark.parametrize(
    ("variables", "gpus", "place", "own"),
    [
        (STEP, 8, (16, 11, "gpu007-ib:61809"), [3]),  # a task a GPU, each sees all of the node
        (STEP, 1, (16, 11, "gpu007-ib:61809"), None),  # ... or its own alone
        (STEP, 0, (16, 11, "gpu007-ib:61809"), None),
        (STEP, 16, (16, 11, "gpu007-ib:61809"), [6, 7]),
        (STEP | {"SLURM_GPUS_PER_TASK": "8"}, 8, (16, 11, "gpu007-ib:61809"), None),
        (STEP | {"SLURM_GPUS_ON_NODE": "64"}, 8, (16, 11, "gpu007-ib:61809"), None),
        (STEP | {"JAX_LOCAL_DEVICE_IDS": "5"}, 8, (16, 11, "gpu007-ib:61809"), None),
        (STEP | {"SLURM_STEP_ID": "2"}, 8, (16, 11, "gpu007-ib:61841"), [3]),
        (STEP | {"JAX_COORDINATOR_PORT": "77"}, 8, (16, 11, "gpu007-ib:77"), [3]),
        (STEP | {"JAX_COORDINATOR_ADDRESS": "a:1"}, 8, (16, 11, "a:1"), [3]),
        (NODES, 8, (2, 1, "gpu007-ib:61809"), None),  # a task a node has all of its GPUs
        (STEP | TORCHRUN, 8, (16, 9, "head:29500"), [1]),  # the innermost
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, 8, (16, 9, "head:29501"), [1]),
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}, 8, (16, 9, "head:29500"), [1]),
        (STEP | {"WORLD_SIZE": "", "RANK": ""}, 8, (16, 11, "gpu007-ib:61809"), [3]),
        (STEP | {"WORLD_SIZE": "16"}, 8, (16, 11, "gpu007-ib:61809"), [3]),
        (BY_HAND, 8, (2, 1, "host0:1234"), None),
        (STEP | BY_HAND, 8, (2, 1, "host0:1234"), None),
        (SKY, 8, (2, 1, "10.0.0.4:8476"), None),
        (MPI, 8, (4, 2, "10.96.0.1:8476"), [0, 1, 2, 3]),
        (
            MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_MCA_orte_hnp_uri": ""},
            8,
            (4, 2, "127.0.0.1:8476"),
            [0, 1],
        ),
        (without(TORCHRUN, "LOCAL_RANK", "LOCAL_WORLD_SIZE"), 8, (16, 9, "head:29500"), None),
    ],
)
def test_several_processes_join(started, variables, gpus, place, own):
    calls = started(variables, gpus)
    processes.join_others(replace(Config(), cluster__heartbeat_seconds=7).cluster)
    found = processes.find_place()
    assert (found.count, found.rank, found.address) == place
    assert calls == [
        {
            "coordinator_address": found.address,
            "num_processes": found.count,
            "process_id": found.rank,
            "local_device_ids": own,
            "cluster_detection_method": "deactivate",  # which would take one GPU under Slurm
            "heartbeat_timeout_seconds": 7,
            "initialization_timeout": 360,
        }
    ]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        JOB | {"SLURM_PROCID": "0"},  # a batch script starts Python itself
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"JAX_NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "3"},
        JOB | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"RANK": "captain"},
        dict.fromkeys([*BY_HAND, *TORCHRUN, *SKY, *MPI, "JOB_COMPLETION_INDEX"], ""),
        SKY | {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"},
    ],
)
def test_one_process_is_alone(started, variables):
    calls = started(variables)
    processes.join_others(Config().cluster)
    assert calls == [] and processes.find_place() == processes.Place()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (without(BY_HAND, "JAX_COORDINATOR_ADDRESS"), "JAX_COORDINATOR_ADDRESS: is not set"),
        (without(BY_HAND, "JAX_NUM_PROCESSES"), "JAX_NUM_PROCESSES: is not set"),
        (without(BY_HAND, "JAX_PROCESS_ID"), "JAX_PROCESS_ID: is not set"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES: is not set, and JAX_PROCESS_ID=0 says"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES: is not set"),
        (BY_HAND | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID: 2 is not below JAX_NUM_PROCESSES=2"),
        (BY_HAND | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID: 'one' is no number"),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": "host0"}, "'host0' has no port"),
        (JOB | {"SLURM_PROCID": "3"}, "SLURM_STEP_NUM_TASKS: is not set, and SLURM_PROCID=3"),
        (
            JOB | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
            "SLURM_STEP_NUM_TASKS: is not set, and SLURM_NTASKS=16",
        ),
        *((without(STEP, f"SLURM_{name}"), f"SLURM_{name}: is not set") for name in
          "STEP_ID STEP_NODELIST STEP_TASKS_PER_NODE PROCID NODEID LOCALID JOB_ID".split()),
        ({"WORLD_SIZE": "8"}, "RANK: is not set, and WORLD_SIZE=8 says"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK: 1 is not below WORLD_SIZE=1"),
        ({"RANK": "1"}, "WORLD_SIZE: is not set, and RANK=1 says"),
        ({"WORLD_SIZE": "8", "RANK": ""}, "RANK: is not set, and WORLD_SIZE=8 says"),
        ({"WORLD_SIZE": "8", "RANK": "0"}, "MASTER_ADDR: is not set"),
        (without(SKY, "SKYPILOT_NODE_IPS"), "SKYPILOT_NODE_IPS: is not set"),
        (without(SKY, "SKYPILOT_NUM_NODES"), "SKYPILOT_NUM_NODES: is not set"),
        (without(MPI, "OMPI_MCA_orte_hnp_uri"), "JAX_COORDINATOR_ADDRESS: is not set"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "JAX_NUM_PROCESSES: is not set, and PMI_SIZE=4"),
        ({"JOB_COMPLETION_INDEX": "0"}, "JAX_NUM_PROCESSES: is not set, and JOB_COMPLETION_INDEX"),
        (STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "the 8 processes on this machine see 3 GPUs"),
    ],
)  # fmt: skip
def test_what_cannot_join_is_refused_in_a_sentence(started, monkeypatch, variables, sentence):
    calls = started(variables)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape(sentence)) as error:
        processes.join_others(Config().cluster)
    assert calls == [] and str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(("seen", "own"), [(2, None), (3, None), (4, None), (8, [3])])
def test_gpus_that_a_script_has_shared_out_are_left_alone(started, monkeypatch, seen, own):
    devices = [pathlib.Path(f"/dev/nvidia{i}") for i in range(32)]
    monkeypatch.setattr(pathlib.Path, "glob", lambda path, pattern: iter(devices))
    calls = started(STEP, seen)
    processes.join_others(Config().cluster)
    assert [call["local_device_ids"] for call in calls] == [own]


def test_a_port_that_is_taken_is_named(started):
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        calls = started(BY_HAND | {"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": address})
        with pytest.raises(RuntimeError, match=f"{address}: process 0 cannot listen on port"):
            processes.join_others(Config().cluster)
    processes.join_others(Config().cluster)
    assert len(calls) == 1


def test_jax_asks_kubernetes_where_it_can(started, monkeypatch):
    calls = started({"JOB_COMPLETION_INDEX": "2"})
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "kubernetes")
    processes.join_others(Config().cluster)
    (call,) = calls
    assert set(call) == {"heartbeat_timeout_seconds", "initialization_timeout"}
    assert processes.find_place().rank == 2


@pytest.mark.parametrize(
    ("own", "gpus", "others", "asked", "flags"),
    [
        (None, 8, False, "auto", processes.GPU_FLAGS),
        (None, 1, True, "auto", processes.GPU_FLAGS),
        (None, 1, False, "auto", None),  # nobody to communicate with
        (None, 0, True, "auto", None),
        (None, 8, False, "", ()),
        ("--xla_a=1", 8, False, "--xla_a=2 --xla_b=3", ("--xla_a=1", "--xla_b=3")),
        ("flags.txt", 8, False, "auto", ("flags.txt",)),
    ],
)
def test_flags_for_gpus_are_those_of_the_user_first(started, own, gpus, others, asked, flags):
    started({} if own is None else {"XLA_FLAGS": own}, gpus)
    for _ in range(2):
        processes.set_gpu_flags(asked, several=others)
        assert os.environ.get("XLA_FLAGS") == (None if flags is None else " ".join(flags))


def test_a_word_that_is_no_flag_is_refused():
    for flags in ("auto", "", "--xla_a=1 --xla_b"):
        rules.validate(replace(Config(), cluster__xla_flags=flags))
    with pytest.raises(ConfigError, match=r"config\.cluster\.xla_flags: .*holds 'fast'"):
        rules.validate(replace(Config(), cluster__xla_flags="--xla_a=1 fast"))


def test_a_command_that_needs_one_process_ends_the_others(started, capsys):
    started(BY_HAND | {"JAX_PROCESS_ID": "0"})
    processes.only_first("generate")
    started(BY_HAND)
    with pytest.raises(SystemExit) as ended:
        processes.only_first("generate")
    assert ended.value.code == 0  # another one would make srun end the first
    assert "process 1 leaves it to process 0" in capsys.readouterr().err


def test_the_full_doctor_is_refused_where_it_would_wait_for_the_others(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"config\.doctor: 'full' is for one process"):
        preflight.examine_once(Config(), level="full", store=None)


class Told(dict):
    """What JAX's coordination service keeps; the other process has answered."""

    def key_value_set(self, key, text, **_):
        self[key] = text

    def blocking_key_value_get(self, key, _):
        return next((text for text in self.values()), "")


DATA = {"splits": {"train": 1}, "tokenizer_hash": "a", "tokenizer_identity": "b"}


@pytest.mark.parametrize(
    ("mine", "data", "version", "told"),
    [
        ({"data__cache_dir": "/other", "data__workers": 3}, {"tokenizer_hash": "c"}, None, ""),
        (
            {"optim__peak_lr": 0.5, "train__keep": 7},
            {},
            None,
            r"peak_lr: 0\.\d+ -> 0\.5; .*keep: 2",
        ),
        ({}, {"splits": {"train": 2}}, None, r"process 0 \(the data\); start"),
        ({"optim__peak_lr": 0.5}, {}, "0.0.9", r"process 0 \(jax \S+ -> 0\.0\.9\); start"),
    ],
)
def test_a_process_with_another_run_is_refused(monkeypatch, mine, data, version, told):
    kept = Told()
    monkeypatch.setattr(together, "store", lambda: kept)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    together.require_agreement(Config(), DATA)
    first = dict(kept)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "__version__", version or jax.__version__)
    with pytest.raises(ConfigError, match=told) if told else contextlib.nullcontext():
        together.require_agreement(replace(Config(), **mine), DATA | data)
    assert (kept == first) == bool(told)  # process 0 goes on where all have agreed


TWO = """
import jax
from lm_jax import config, door, processes, together
from lm_jax.config import ConfigError

def work():
    print("worked", jax.process_index())
    return {"a": 1.5, "here": together.first_alone("inside", lambda: 2)}

def fail():
    raise ConfigError("a.b: is wrong; mend it.")

@door.command
def main(argv):
    processes.join_others(config.Config().cluster)
    print("found", together.first_alone("good", work))
    print("again", together.first_alone("good", lambda: 3))  # as in a second training
    together.first_alone("bad", fail)

main()
"""


def begin(code, address, rank):
    own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": rank}
    # An unknown flag would abort.
    flags = " ".join([os.environ.get("XLA_FLAGS", ""), *processes.GPU_FLAGS])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | own | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_one_of_two_processes_works_and_both_end():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # A third one waits in vain: JAX would abort with a trace of C++, a minute later.
    late = TWO.replace("@door", "processes.WAIT = 1.0\n\n@door")
    children = [
        begin(TWO, address, "0"),
        begin(TWO, address, "1"),
        begin(late, "127.0.0.1:9", "1"),
    ]
    try:
        said = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    found = "found {'a': 1.5, 'here': 2}\nagain 3\n"
    assert [out for out, _ in said] == [f"worked 0\n{found}", found, ""], said
    assert said[0][1].strip() == "a.b: is wrong; mend it."
    assert "process 0 ended while all waited for it: ConfigError: a.b: is wrong" in said[1][1]
    assert said[2][1].strip() == (
        "127.0.0.1:9: process 1 has waited 1 s there for all of the 2 processes; see that each was "
        "started, and that its machine reaches this address."
    )
    assert [child.returncode for child in children] == [2, 1, 1]


# What `man sbatch` knows of the options that the file uses.
SBATCH = set(
    "job-name nodes ntasks-per-node gpus-per-node cpus-per-task time output open-mode signal "
    "requeue".split()
)


def test_the_slurm_file_is_a_script_with_known_options():
    path = ROOT / "scripts/launch/slurm.sh"
    subprocess.run(["bash", "-n", path], check=True)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [match[1] for line in lines if (match := re.match(r"#SBATCH --([\w-]+)", line))]
    assert len(options) == sum(line.startswith("#SBATCH") for line in lines)
    assert set(options) <= SBATCH and {"nodes", "ntasks-per-node", "gpus-per-node"} <= set(options)
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert not [line for line in lines[:last] if line and not line.startswith("#")]  # else ignored


# The fields of the JobSet that the file uses, from jobset.x-k8s.io/v1alpha2, batch/v1 and v1.
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "env": [{"name": str, "value?": str, "valueFrom?": {"fieldRef": {"fieldPath": str}}}],
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "containers": [CONTAINER],
    "volumes": [
        {
            "name": str,
            "emptyDir?": {"medium": str},
            "persistentVolumeClaim?": {"claimName": str},
        }
    ],
}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "failurePolicy": {"maxRestarts": int},
        "network": {"enableDNSHostnames": bool},
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "completionMode": str,
                        "backoffLimit": int,
                        "template": {"spec": POD},
                    }
                },
            }
        ],
    },
}


def fits(value, schema, where=""):
    if isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for i, one in enumerate(value):
            fits(one, schema[0], f"{where}[{i}]")
    elif isinstance(schema, dict):
        known = {name.removesuffix("?"): name for name in schema}
        assert set(value) <= set(known), (where, set(value) - set(known))
        assert {n for n, name in known.items() if not name.endswith("?")} <= set(value), where
        for name, one in value.items():
            fits(one, schema[known[name]], f"{where}.{name}")
    else:
        assert type(value) is schema, (where, value)


def test_the_jobset_gives_each_pod_the_three_variables():
    jobset = yaml.safe_load((ROOT / "scripts/launch/jobset.yaml").read_text())
    fits(jobset, JOBSET)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    (job,) = jobset["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    assert job["replicas"] == 1 and pods["completionMode"] == "Indexed"
    (container,) = pods["template"]["spec"]["containers"]
    env = {one["name"]: one for one in container["env"]}
    name = jobset["metadata"]["name"]  # of the headless service too
    first = f"{name}-{job['name']}-0-0.{name}"
    assert re.fullmatch(re.escape(first) + r":\d+", env["JAX_COORDINATOR_ADDRESS"]["value"])
    assert env["JAX_NUM_PROCESSES"]["value"] == str(pods["parallelism"]) == str(pods["completions"])
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == index
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in pods["template"]["spec"]["volumes"]}
