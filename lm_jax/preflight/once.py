"""Findings kept for the next start of the same run."""

import contextlib
import datetime
import hashlib
import pathlib

import jax

import lm_jax
from lm_jax import config
from lm_jax.config import Config, incidental_fields
from lm_jax.data.files import hash_json
from lm_jax.data.store import Store
from lm_jax.doctor.findings import Report
from lm_jax.files import can_write, write_text
from lm_jax.preflight.run import examine_config


def examine_once(cfg: Config, *, level: str, store: Store) -> tuple[Report, str]:
    """The findings of `examine_config`, or those kept from an earlier start.

    They are kept where no check failed, for the hash of config, data, source, versions and device.
    A teacher may change behind its path, so a distillation is examined at every start.

    Returns:
        The findings, and the day on which they were made if they are kept ones, else nothing.
    """
    numbers = {path: x for path, x in config.named_fields(cfg) if path not in incidental_fields()}
    key = hash_json([numbers, level, store.manifest, _source(), jax.__version__])
    kept = pathlib.Path(cfg.data.cache_dir).expanduser() / "preflights" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none, or damaged
        found = Report.from_json(kept.read_text())
        return found, datetime.date.fromtimestamp(kept.stat().st_mtime).isoformat()
    report = examine_config(cfg, level=level, store=store)
    if report.clean and not cfg.distill.taught and can_write(kept.parent):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, report.to_json())
    return report, ""


def _source() -> list[str]:
    """The package as it is, and where it runs."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(lm_jax.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return [digest.hexdigest(), jax.devices()[0].device_kind, str(jax.device_count())]
