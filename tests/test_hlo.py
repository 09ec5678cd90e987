import dataclasses
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))
import hlo  # noqa: E402
from devices import DEVICES  # noqa: E402

STEP = """HloModule jit_step, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%fused_part (param_0: f32[8,4], param_1: s32[]) -> f32[1,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = f32[1,4]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,4}
  ROOT %twice = f32[1,4]{1,0} add(%part, %part)
}

%fused_product (param_0.1: bf16[1024,512], param_1.1: bf16[512,2048]) -> f32[1024,2048] {
  %param_0.1 = bf16[1024,512]{1,0} parameter(0)
  %param_1.1 = bf16[512,2048]{1,0} parameter(1)
  ROOT %dot = f32[1024,2048]{1,0} dot(%param_0.1, %param_1.1), lhs_contracting_dims={1}
}

%body (carry: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %carry = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%carry), index=1
  %row = f32[1,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused_part
  %gemm = f32[1024,2048]{1,0} fusion(%left, %right), kind=kCustom, calls=%fused_product
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %x)
}

ENTRY %main (x.1: f32[8,4]) -> f32[8,4] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  %begin = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%begin, %x.1)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%more, body=%body, KNOWN
  %attention = f32[8,4]{1,0} custom-call(%x.1), custom_call_target="attention_forward"
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"5"}}'


def test_a_step_is_counted_as_often_as_its_loops_run():
    found = hlo.count(hlo.Module(STEP.replace("KNOWN", KNOWN)))
    assert found["kernels"] == 5 * 2 + 1 and found["attention_kernels"] == 1
    assert found["16_bit_products"] == 5 and found["float32_products"] == 0
    assert found["unknown_loops"] == 0
    part = 16 + 4 + 16  # a row in, its number, a row out
    product = 2 * 1024 * 512 + 2 * 512 * 2048 + 4 * 1024 * 2048
    assert found["gigabytes"] == pytest.approx(5 * (part + product) / 1e9, abs=1e-3)
    slowest = max(product / 4.0e12, 2 * 1024 * 512 * 2048 / 790e12)
    assert found["roofline_ms"] == pytest.approx(5e3 * (slowest + hlo.LAUNCH), abs=1e-3)


def test_float32_products_and_loops_of_unknown_length_are_named():
    found = hlo.count(hlo.Module(STEP.replace("KNOWN", "").replace("bf16", "f32")))
    assert found["unknown_loops"] == 1
    assert found["float32_products"] == 1 and found["16_bit_products"] == 0


def test_products_of_cublas_are_counted_by_the_rates_of_the_device():
    call = """ENTRY %main (x: f32[8,64,16]) -> f32[8,64,32] {
  %x = f32[8,64,16]{2,1,0} parameter(0)
  %w = f32[8,16,32]{2,1,0} parameter(1)
  ROOT %y = (f32[8,64,32]{2,1,0}, s8[64]{0}) custom-call(%x, %w), TARGET, DIMENSIONS
}
"""
    target = 'custom_call_target="__cublas$lt$matmul"'
    dimensions = 'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}'
    module = hlo.Module(call.replace("TARGET", target).replace("DIMENSIONS", dimensions))
    (kernel,) = module.kernels()
    assert kernel.flops == 2 * 8 * 64 * 32 * 16 and kernel.products == "float32"
    slow = dataclasses.replace(DEVICES["t4"], single=1e9)
    assert kernel.seconds(slow) == pytest.approx(kernel.flops / 1e9)
