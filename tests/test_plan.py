"""The arithmetic of scripts/plan.py and scripts/traffic.py, without a compiler."""

import pathlib
import sys

import pytest

from lm_jax.config import ConfigError
from lm_jax.config.resolve import resolve
from tests.helpers import load_config

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))
import hlo  # noqa: E402
import plan  # noqa: E402
import traffic  # noqa: E402
from devices import DEVICES  # noqa: E402

STEP = """HloModule jit_step, entry_computation_layout={()->()}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], bf16[256,1024])) -> (s32[], bf16[256,1024]) {
  %carry = (s32[], bf16[256,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[256,1024]{1,0} get-tuple-element(%carry), index=1
  %whole = (bf16[256,1024]{1,0}, bf16[2048,1024]{1,0}) all-gather-start(%x), GROUPS, dimensions={0}
  %gathered = bf16[2048,1024]{1,0} all-gather-done(%whole)
  ROOT %out = (s32[], bf16[256,1024]{1,0}) tuple(%i, %x)
}

ENTRY %main (x.1: bf16[256,1024], g: f32[800]) -> bf16[256,1024] {
  %x.1 = bf16[256,1024]{1,0} parameter(0)
  %g = f32[800]{0} parameter(1)
  %begin = s32[] constant(0)
  %start = (s32[], bf16[256,1024]{1,0}) tuple(%begin, %x.1)
  %loop = (s32[], bf16[256,1024]{1,0}) while(%start), condition=%more, body=%body, KNOWN
  %part = f32[100]{0} reduce-scatter(%g), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %total = (f32[800]{0}, f32[800]{0}) all-reduce-start(%g), replica_groups={}, to_apply=%add
  %summed = f32[800]{0} all-reduce-done(%total)
  %other = f32[800]{0} all-to-all(%g), replica_groups=[2,4]<=[8], dimensions={0}
  %next = f32[800]{0} collective-permute(%g), source_target_pairs={{0,1},{1,0}}
  ROOT %result = bf16[256,1024]{1,0} get-tuple-element(%loop), index=1
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"5"}}'


def step(groups="replica_groups=[1,8]<=[8]"):
    return hlo.Module(STEP.replace("GROUPS", groups).replace("KNOWN", KNOWN))


def test_collectives_are_counted_as_often_as_their_loops_run():
    found = {c.op: c for c in traffic.collectives(step())}
    sent = {op: (c.times, c.sent) for op, c in found.items()}
    part = 2 * 256 * 1024
    assert sent == {
        "all-gather": (5, 8 * part * 7 / 8),
        "reduce-scatter": (1, 3200 * 7 / 8),
        "all-reduce": (1, 2 * 3200 * 7 / 8),
        "all-to-all": (1, 3200 * 3 / 4),
        "collective-permute": (1, 3200),
    }
    counted = traffic.count(step())
    assert counted["all_gather"] == 5 and counted["gathered_gib"] == round(40 * part / 2**30, 3)


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups={}", 8),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}", 8),
        ("replica_groups=mesh['data'=1,'fsdp'=8] {'fsdp':(1)4}", 4),
    ],
)
def test_groups_are_read_however_they_are_written(groups, devices):
    gather = next(c for c in traffic.collectives(step(groups)) if c.op == "all-gather")
    assert gather.devices == devices


def test_a_group_that_is_written_otherwise_is_an_error():
    with pytest.raises(ValueError, match="whole: no replica_groups in"):
        list(traffic.collectives(step("groups=8")))


def test_the_bound_of_an_update():
    device = DEVICES["h100"]
    found = plan.work(step(), device, peak=70e9, attention=1e15)
    assert found.kinds["all-gather"] == 5 and found.attention == 0  # it has no kernel of it
    found = found._replace(attention=989e9, kernels=0.002, sent=4.5e9)
    bound = plan.times(found, device, device.link)
    assert bound.compute == pytest.approx(0.003) and bound.communication == pytest.approx(0.01)
    assert bound.hidden == pytest.approx(0.01) and bound.waiting == pytest.approx(0.013)
    text = plan.described(found, device, device.link, tokens=1300, devices=8)
    assert "65.2 GiB at most, of 74.5: fits" in text and "MEM_FRACTION=0.9" in text
    assert "130,000 tokens/s if communication is hidden" in text and "100,000 tokens/s" in text
    assert max(map(len, text.splitlines())) <= 80
    tight = plan.described(found._replace(peak=73e9), device, device.link, 1300, 8)
    assert "does not fit" in tight and "MEM_FRACTION" not in tight


def test_attention_is_counted_by_its_products():
    cfg = resolve(load_config("llama_110m").get_config(), windows=10)
    forward = 4 * 12 * 64 * 2048**2 / 2 * 64 * 12  # two products, half of the square, all layers
    assert plan.attention_flops(cfg, 8) == pytest.approx((2 * forward + 5 / 2 * forward) / 8)


def test_fewer_rows_are_tried_down_to_one():
    assert list(plan.fewer(60, 60)) == [60, 30, 15, 6, 3, 1]
    assert list(plan.fewer(8, 3)) == [2, 1]


def test_a_mesh_is_read():
    assert plan.parse_mesh("data=1,fsdp=8") == {"data": 1, "fsdp": 8}
    for wrong in ("fsdp", "fsdp=0", "8"):
        with pytest.raises(ConfigError, match=f"--mesh: '{wrong}' is no mesh; write it as data="):
            plan.parse_mesh(wrong)
    with pytest.raises(ConfigError, match="--mesh: a run has no axis pipeline; use data, fsdp"):
        plan.parse_mesh("pipeline=2")
