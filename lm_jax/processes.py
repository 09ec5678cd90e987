"""Which of several processes this one is, and how they meet.

A launcher tells its processes by environment variables. They are read here rather than by
jax.distributed, which under Slurm and Open MPI takes one GPU a process, whatever the process has.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import socket
import sys
import threading
from typing import Any

from lm_jax import console
from lm_jax.config import ConfigError
from lm_jax.config.fields import ClusterConfig

# Where a launcher tells how many there are, and which of them this is; the innermost first.
_LAUNCHERS = {
    "JAX_NUM_PROCESSES": "JAX_PROCESS_ID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "RANK",  # torchrun, and operators of Kubernetes
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "SKYPILOT_NUM_NODES": "SKYPILOT_NODE_RANK",
}
_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_PORT = "8476"  # where a launcher names none
WAIT = 300.0  # seconds for all to arrive

# For several GPUs: communication beside computation, and in large pieces. All are known to XLA in
# JAX 0.10.2 to 0.12; one that is not would abort the process.
GPU_FLAGS = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
    "--xla_gpu_enable_pipelined_reduce_scatter=true",
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of several processes this one is."""

    count: int = 1  # of all; 0: JAX asks Kubernetes
    rank: int = 0
    address: str = ""  # HOST:PORT of the first, where they meet
    local_rank: int = 0  # among those on this machine
    local_count: int = 1


def find_place() -> Place:
    """What the launcher says of this process, or what it has joined; without one it is alone.

    A batch script of Slurm that starts Python itself is alone, whatever tasks its job has.

    Raises:
        ConfigError: if several processes were started and a variable that says how they meet is
            missing or wrong: each of them would train for itself, into the same folder.
    """
    here = {name: value for name, value in os.environ.items() if value}
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        return Place(jax.process_count(), jax.process_index())
    if here.get("JAX_NUM_PROCESSES") == "1":
        return Place()
    by_hand = [name for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if name in here]
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", _ADDRESS) if by_hand else ():
        _require(name, by_hand[0])
    for count_name, rank_name in _LAUNCHERS.items():
        if count_name not in here or rank_name not in here:
            continue
        count, rank = _number(count_name), _number(rank_name)
        if rank >= count:
            raise ConfigError(
                f"{rank_name}: {rank} is not below {count_name}={count}; count from 0."
            )
        if count > 1:
            return Place(count, rank, _address(count_name), *_local(count_name))
    _refuse_alone()
    if "JOB_COMPLETION_INDEX" in here:
        if importlib.util.find_spec("kubernetes"):
            return Place(0, _number("JOB_COMPLETION_INDEX"))
        raise ConfigError(
            "JAX_NUM_PROCESSES: is not set, and JOB_COMPLETION_INDEX says that this is a pod of an "
            f"indexed Job; set it, JAX_PROCESS_ID and {_ADDRESS}, or install jax[k8s], or set it "
            "to 1 if every pod has a run of its own."
        )
    return Place()


def _refuse_alone() -> None:
    """Raise ConfigError at a sign of other processes, where no launcher says enough of them."""
    for count_name, rank_name in _LAUNCHERS.items():
        if _above(count_name, 1):
            _require(rank_name, count_name)
        if _above(rank_name, 0):
            _require(count_name, rank_name)
    # The largest numbers of steps are those of batch scripts and of shells.
    if _above("SLURM_STEP_ID", -1) and not _above("SLURM_STEP_ID", 1 << 31):
        if _above("SLURM_NTASKS", 1):
            _require("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if _above("PMI_SIZE", 1):  # of MPICH, which does not say where they meet
        _require("JAX_NUM_PROCESSES", "PMI_SIZE")
    if os.environ.get(_ADDRESS):
        _require("JAX_NUM_PROCESSES", _ADDRESS)


def _above(name: str, least: int) -> bool:
    """Whether a variable is such a number; RANK and the like may be somebody else's words."""
    text = os.environ.get(name, "")
    return text.isdecimal() and int(text) > least


def _require(name: str, sign: str) -> str:
    """The value of a variable, which must be there beside another one."""
    if not os.environ.get(name):
        raise ConfigError(
            f"{name}: is not set, and {sign}={os.environ[sign]} says that several processes were "
            f"started; set it in each of them, or unset {sign} for a process of its own."
        )
    return os.environ[name]


def _number(name: str, sign: str = "") -> int:
    text = _require(name, sign)
    if not re.fullmatch(r"\d+", text):
        raise ConfigError(f"{name}: {text!r} is no number; give 0, 1, 2 ...")
    return int(text)


def _address(launcher: str) -> str:
    """HOST:PORT of the first process."""
    here = os.environ
    if given := here.get(_ADDRESS):
        if not re.fullmatch(r".+:\d+", given):
            raise ConfigError(f"{_ADDRESS}: {given!r} has no port; write HOST:PORT.")
        return given
    port = _PORT
    if launcher == "SLURM_STEP_NUM_TASKS":
        # The first of a list like "node[001,007-015]-ib,host2".
        nodes = _require("SLURM_STEP_NODELIST", launcher)
        host = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]
        # Steps that run at a time on one node have ports of their own.
        job, step = (_number(f"SLURM_{name}_ID", launcher) for name in ("JOB", "STEP"))
        port = str(61_440 + (job + 16 * step) % 4_096)
    elif launcher == "SKYPILOT_NUM_NODES":
        host = _require("SKYPILOT_NODE_IPS", launcher).split()[0]
    elif launcher == "WORLD_SIZE":
        host, port = _require("MASTER_ADDR", launcher), _require("MASTER_PORT", launcher)
        if here.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun itself listens there
            port = str(_number("MASTER_PORT", launcher) + 1)
    elif found := re.search(r"tcp://([^:,]+)", here.get("OMPI_MCA_orte_hnp_uri", "")):
        host = found[1]
    elif here[launcher] == here.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        host = "127.0.0.1"
    else:  # Open MPI 5 tells nobody where the first one is
        return _require(_ADDRESS, launcher)
    return f"{host}:{here.get('JAX_COORDINATOR_PORT') or port}"


def _local(launcher: str) -> tuple[int, int]:
    """This process among those on its machine, and their number."""
    if launcher == "OMPI_COMM_WORLD_SIZE":
        names = "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
    elif launcher == "WORLD_SIZE" and os.environ.get("LOCAL_WORLD_SIZE"):
        names = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    elif launcher == "SLURM_STEP_NUM_TASKS":
        counts: list[int] = []  # like "8(x2),4": two nodes with 8 tasks, one with 4
        tasks = _require("SLURM_STEP_TASKS_PER_NODE", launcher)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
            counts += [int(count)] * int(times or 1)
        return _number("SLURM_LOCALID", launcher), counts[_number("SLURM_NODEID", launcher)]
    else:
        return 0, 1
    return _number(names[0], launcher), _number(names[1], launcher)


def visible_gpus() -> int:
    """Number of the NVIDIA GPUs that JAX will see, without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return _gpus_there()
    return len(re.findall(r"(?:^|,)\s*(?:\d|GPU-|MIG-)", named))


def _gpus_there() -> int:
    """Number of the NVIDIA GPUs of this machine, or of this container."""
    return len([*pathlib.Path("/dev").glob("nvidia[0-9]*")])


def _own_gpus(place: Place) -> list[int] | None:
    """The GPUs of this process among those that it sees; None: all of them."""
    seen, here = visible_gpus(), os.environ
    apart = here.get("SLURM_GPUS_PER_TASK") or seen < int(here.get("SLURM_GPUS_ON_NODE") or 0)
    if apart or place.local_count == 1 or seen <= 1 or here.get("JAX_LOCAL_DEVICE_IDS"):
        return None  # the launcher has shared them out, or there is nothing to share
    share, left = divmod(seen, place.local_count)
    if left or not share:
        if seen * place.local_count <= _gpus_there():
            return None  # a script around this one has shared them out
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES: the {place.local_count} processes on this machine see {seen} "
            "GPUs and cannot share them evenly; start one process a GPU, or one a machine."
        )
    return [*range(place.local_rank * share, (place.local_rank + 1) * share)]


def join_others(cluster: ClusterConfig) -> None:
    """Meet the other processes, if a launcher started several; before JAX computes anything.

    Where not all arrive, the process ends with a sentence. JAX itself would abort.

    Raises:
        ConfigError: as `find_place`, and if processes on one machine cannot share its GPUs.
        RuntimeError: if another program has the port on which they are to meet.
    """
    place = find_place()
    set_gpu_flags(cluster.xla_flags, several=place.count != 1)
    if place.count == 1:
        return
    import jax  # late, for who asks `find_place` may need no JAX

    if jax.distributed.is_initialized():
        return
    options: dict[str, Any] = {}
    if place.count:
        options = dict(
            coordinator_address=place.address,
            num_processes=place.count,
            process_id=place.rank,
            local_device_ids=_own_gpus(place),
            cluster_detection_method="deactivate",
        )
        if place.rank == 0:
            _require_port(place.address)
    late = threading.Timer(WAIT, _give_up, [place])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **options,
            heartbeat_timeout_seconds=cluster.heartbeat_seconds,
            initialization_timeout=int(WAIT) + 60,
        )
    finally:
        late.cancel()


def _require_port(address: str) -> None:
    """Raise RuntimeError if nothing can listen there; JAX would end without a word."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RuntimeError(
                f"{address}: process 0 cannot listen on port {port} ({error.strerror}); give all "
                "processes another one in JAX_COORDINATOR_PORT, or in JAX_COORDINATOR_ADDRESS "
                "where that is set."
            ) from error


def _give_up(place: Place) -> None:
    where = place.address or "the first pod of the Job"
    console.leave(
        f"{where}: process {place.rank} has waited {WAIT:.0f} s there for all of the "
        f"{place.count or 'other'} processes; see that each was started, and that its machine "
        "reaches this address."
    )
    os._exit(1)


def set_gpu_flags(flags: str, *, several: bool) -> None:
    """Add flags to XLA_FLAGS where several GPUs take part; those that stand there win.

    Args:
        flags: with spaces between them, or "auto" for `GPU_FLAGS`.
        several: whether there are other processes.
    """
    own = os.environ.get("XLA_FLAGS", "").split()
    a_file = own and not own[0].startswith("-")  # XLA reads its flags there
    if a_file or visible_gpus() < (1 if several else 2):
        return
    names = {flag.partition("=")[0] for flag in own}
    wanted = GPU_FLAGS if flags == "auto" else flags.split()
    own += [flag for flag in wanted if flag.partition("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join(own)


def only_first(command: str) -> None:
    """End all processes but the first, for a command that needs no others."""
    if rank := find_place().rank:
        console.complain(f"{command} needs one process: process {rank} leaves it to process 0")
        sys.exit(0)
