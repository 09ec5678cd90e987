"""Findings kept for the next start of the same run."""

import contextlib
import datetime
import hashlib
import pathlib
from typing import Any

import jax

import lm_jax
from lm_jax import config, together
from lm_jax.config import Config, ConfigError, incidental_fields
from lm_jax.data.files import hash_json
from lm_jax.data.store import Store
from lm_jax.doctor.findings import Report
from lm_jax.files import can_write, write_text
from lm_jax.preflight.run import examine_config


def examine_once(cfg: Config, *, level: str, store: Store) -> tuple[Report, str]:
    """The findings of `examine_config`, or those kept from an earlier start.

    They are kept where no check failed, for the hash of config, data, source, versions and device.
    A teacher may change behind its path, so a distillation is examined at every start.

    Of several processes the first one examines, and the others wait for its findings; not in a
    distillation, whose teacher lies on the devices of all.

    Returns:
        The findings, and the day on which they were made if they are kept ones, else nothing.

    Raises:
        ConfigError: for level full in several processes.
    """
    if level == "full" and jax.process_count() > 1:
        raise ConfigError(
            "config.doctor: 'full' is for one process; give 'fast' here, and run "
            "`python -m lm_jax.doctor CONFIG --level=full` before."
        )
    if cfg.distill.taught:
        return examine_config(cfg, level=level, store=store), ""
    left_out = incidental_fields() - {"data.micro_batch", "mesh.fsdp", "mesh.tensor"}
    numbers = {path: x for path, x in config.named_fields(cfg) if path not in left_out}
    asked = [numbers, level, store.manifest]
    found, day = together.first_alone(
        f"findings {hash_json(asked)}", lambda: _examined(cfg, level, store, asked)
    )
    return Report.from_json(found), day


def _examined(cfg: Config, level: str, store: Store, asked: list[Any]) -> tuple[str, str]:
    """Findings as JSON, and their day."""
    key = hash_json([*asked, _source(), jax.__version__])
    kept = pathlib.Path(cfg.data.cache_dir).expanduser() / "preflights" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none, or damaged
        found = kept.read_text()
        Report.from_json(found)
        return found, datetime.date.fromtimestamp(kept.stat().st_mtime).isoformat()
    report = examine_config(cfg, level=level, store=store)
    if report.clean and can_write(kept.parent):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, report.to_json())
    return report.to_json(), ""


def _source() -> list[str]:
    """The package as it is, and where it runs."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(lm_jax.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return [digest.hexdigest(), jax.devices()[0].device_kind, str(jax.device_count())]
