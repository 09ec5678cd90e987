"""What several processes tell one another through JAX's coordination service, beside computing."""

import collections
import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import lm_jax
from lm_jax import config
from lm_jax.config import Config, ConfigError

_SLICE = 1_000  # milliseconds of a wait, in which Python hears no signal
# What may differ: where the data of a process lie, which their hashes know, and how it reads them.
_OWN = {
    *("data.source_dir", "data.files", "data.valid_files", "data.test_files", "data.cache_dir"),
    *("data.workers", "data.threads", "tokenizer.folder"),
}
# Of a manifest: what differs for equal data, as `same_data` says.
_INEXACT = {"entropy_rate", "tokenizer_hash", "sha256"}
_working_alone = False
_asked: collections.Counter[str] = collections.Counter()  # times that a name was asked for


def store() -> Any:
    """The keys and values that all processes see; None if there is one process."""
    import jax  # late, for the workers that prepare data need none
    from jax._src import distributed  # has no public door, and collectives do not wait for hours

    return distributed.global_state.client if jax.process_count() > 1 else None


def first_alone(name: str, work: Callable[[], Any]) -> Any:
    """Let the first process work while the others wait, and give its result to all.

    Args:
        name: of the result. Who asks for it again gets that of the first process's next work.
        work: returns what JSON can hold, and computes with no other process.

    Raises:
        RuntimeError: in all others, if the first one failed.
    """
    global _working_alone
    import jax

    shared = store()
    if shared is None or _working_alone:
        return work()
    key = f"lm_jax/{name}/{_asked[name]}"
    _asked[name] += 1
    if jax.process_index():
        found = json.loads(_awaited(shared, key))
        if "error" in found:
            raise RuntimeError(f"process 0 ended while all waited for it: {found['error']}")
        return found["result"]
    _working_alone = True
    try:
        result = work()
        shared.key_value_set(key, json.dumps({"result": result}))
        return result
    except BaseException as error:
        told = f"{type(error).__name__}: {error}"
        shared.key_value_set(key, json.dumps({"error": told}), allow_overwrite=True)
        raise
    finally:
        _working_alone = False


def _awaited(shared: Any, key: str) -> str:
    """A value, once it is there; the heartbeat ends who waits for a process that died."""
    import jax

    while True:
        try:
            return str(shared.blocking_key_value_get(key, _SLICE))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def tell(name: str, text: str) -> None:
    """Leave a word for the other processes, for `told`."""
    import jax

    if (shared := store()) is not None:
        shared.key_value_set(f"lm_jax/{name}/{jax.process_index()}", text)


def told(name: str) -> str:
    """A word that one of the processes has left; empty if there is none."""
    import jax

    if (shared := store()) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first is gone: JAX ends all
            return next((text for _, text in shared.key_value_dir_get(f"lm_jax/{name}/")), "")
    return ""


def require_agreement(cfg: Config, manifest: Mapping[str, Any]) -> None:
    """Refuse a process that would train another run than the first one, which waits for all.

    Args:
        cfg: the config as resolved here.
        manifest: of the data.

    Raises:
        ConfigError: in all but the first process, naming what differs.
    """
    import jax

    if (shared := store()) is None:
        return
    mine = {"lm_jax": lm_jax.__version__, "jax": jax.__version__}
    run = {"versions": mine, "config": config.to_dict(cfg), "data": dict(manifest)}
    first = first_alone("agreement", lambda: run)
    versions, data = first["versions"], first["data"]
    lines = [
        f"{name} {versions[name]} -> {own}" for name, own in mine.items() if versions[name] != own
    ]
    if not lines:
        lines = config.difference(config.from_dict(first["config"]), cfg, _OWN)
    if any(data[key] != manifest[key] for key in {*data} & {*manifest} - _INEXACT):
        lines.append("the data")
    if lines:
        raise ConfigError(
            f"process {jax.process_index()} has another run than process 0 ({'; '.join(lines)}); "
            "start all with the same config, data and versions."
        )
    same = f"same/{_asked['agreement']}"
    if jax.process_index():
        tell(same, "")
        return
    for process in range(1, jax.process_count()):
        _awaited(shared, f"lm_jax/{same}/{process}")
