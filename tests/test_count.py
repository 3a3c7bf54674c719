"""Tests the counter of cycles, bytes and kernels on programs whose cost is known."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "benchmarks")]
from count import Cost, Program, nbytes, parse  # noqa: E402

X = jax.ShapeDtypeStruct((64, 128), jnp.float32)
SIZE = 4 * 64 * 128


def compiled(f, *args):
    return Program(jax.jit(f).lower(*args).compile().as_text())


@pytest.mark.parametrize("length", [1, 7])
def test_the_body_of_a_scan_counts_once_a_round(length):
    def f(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, length=length)[0]

    program = compiled(f, X)
    once = compiled(jnp.sin, X).cost()
    if length > 1:  # XLA unrolls a single round
        assert program.loops() == (1, 0)
    # The loop's counter and a copy are counted in addition to the body.
    assert length * 2 * SIZE <= program.cost().bytes <= length * 2 * SIZE + 2 * SIZE + 64 * length
    assert once.bytes == 2 * SIZE


def test_a_loop_of_unknown_length_counts_no_round_and_one_beside():
    def f(x):
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: x * 0.5, x)

    program = compiled(f, X)
    assert program.loops() == (0, 1)
    one = program.cost(rounds=1)
    assert one.bytes - program.cost().bytes >= 2 * SIZE
    assert program.cost(rounds=3).bytes - one.bytes == 2 * (one.bytes - program.cost().bytes)


TPU = """HloModule jit_f, is_scheduled=true

%fused (param_0.1: f32[8,128]) -> f32[8,128] {
  %param_0.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %sine = f32[8,128]{1,0:T(8,128)} sine(%param_0.1)
}

%sliced (param_0.2: f32[64,128]) -> f32[8,128] {
  %param_0.2 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %slice = f32[8,128]{1,0:T(8,128)} slice(%param_0.2), slice={[0:8], [0:128]}
  ROOT %cosine = f32[8,128]{1,0:T(8,128)} cosine(%slice)
}

%body (arg: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %arg = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %f = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fusedCYCLES(100)
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%next, %f)
}

%condition (arg.1: (s32[], f32[8,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[64,128]) -> f32[8,128] {
  %x.1 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %part = f32[8,128]{1,0:T(8,128)} fusion(%x.1), kind=kLoop, calls=%slicedCYCLES(30)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %part)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  ROOT %y = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""
ESTIMATE = ', backend_config={"window_config":{"estimated_cycles":"%s"}}'
for number in ("100", "30"):
    TPU = TPU.replace(f"CYCLES({number})", ESTIMATE % number)
TILE = 4 * 8 * 128


def test_on_a_tpu_the_condition_says_how_many_rounds_a_scan_has():
    program = Program(TPU)
    assert program.loops() == (1, 0)
    assert program.cost().cycles == 30 + 12 * 100


def test_what_is_read_through_a_slice_counts_as_the_slice():
    without = Program(TPU.replace("constant(12)", "constant(0)"))
    assert without.cost().bytes == 2 * TILE
    rounds = Program(TPU).cost().bytes - without.cost().bytes
    assert rounds == 12 * (2 * TILE + 3 * 4)  # this includes the addition of the counter


def test_an_instruction_without_an_estimate_makes_the_cycles_unknown():
    call = 'custom-call(%x), custom_call_target="my_kernel"'
    text = TPU.replace("fusion(%x), kind=kLoop, calls=%fused", call, 1)
    program = Program(text.replace(ESTIMATE % "100", ""))
    assert program.cost().cycles is None
    assert program.cost().kernels == Program(TPU).cost().kernels


def test_a_reshape_without_an_estimate_counts_as_a_copy():
    text = TPU.replace("fusion(%x), kind=kLoop, calls=%fused", "reshape(%x)", 1)
    text = text.replace(ESTIMATE % "100", "")
    assert Program(text).cost().cycles == 30 + 12 * (1824 + 2 * TILE // 311)


def test_a_conditional_is_refused():
    text = TPU.replace(
        "fusion(%x), kind=kLoop, calls=%fused", "conditional(%x), branch_computations={%fused}", 1
    )
    with pytest.raises(ValueError, match="a conditional"):
        Program(text).cost()


def test_bytes_of_types():
    assert nbytes("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}") == 2 * 8 * 128
    assert nbytes("(f32[256]{0}, pred[3]{0}, s32[], token[])") == 4 * 256 + 3 + 4
    assert Cost(1, 2, 3) + Cost(None, 1, 1) * 2 == Cost(None, 4, 5)
    computations, entry = parse(TPU)
    assert entry == "main"
    assert set(computations) == {"fused", "sliced", "body", "condition", "main"}
