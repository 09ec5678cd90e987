"""Race detection for kernels under the Mosaic GPU interpreter."""

import contextlib

from jax.experimental.pallas import mosaic_gpu as plgpu

WGMMA = plgpu.wgmma


def operands_watched(acc, a, b):
    """WGMMA that also loads its operands: the interpreter checks loads for races, but not WGMMA."""
    for operand in (a, b):
        operand[...]
    plgpu.commit_smem()  # what a load would need, and WGMMA not, before TMA writes there again
    WGMMA(acc, a, b)


@contextlib.contextmanager
def forbidden(monkeypatch, capfd):
    """Fails where there was a race: an exception, or a message in older jax."""
    monkeypatch.setattr(plgpu, "wgmma", operands_watched)
    yield
    assert "RACE" not in capfd.readouterr().out
