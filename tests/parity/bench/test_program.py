"""What a compiled program moves is counted from its text, as XLA prints it."""

import pytest

from parity.bench.program import Array, Program, total


def program(*lines: str, computations: str = "", trips: int = 1) -> Program:
    body = "\n".join(f"  {line}" for line in lines)
    entry = f"ENTRY %main () -> f32[] {{\n{body}\n}}\n"
    return Program(f"HloModule m\n\n{computations}\n\n{entry}", trips)


def moved(*lines: str, computations: str = "", trips: int = 1) -> int:
    return total(program(*lines, computations=computations, trips=trips).moves())


X = "%x = f32[100,10]{1,0} parameter(0)"  # 4,000 bytes
AT = "%i = s32[] parameter(1)"


@pytest.mark.parametrize(
    ("dtype", "size"), [("f32", 24), ("bf16", 12), ("s8", 6), ("u4", 3), ("pred", 6), ("token", 0)]
)
def test_an_array_has_the_bytes_of_its_type(dtype: str, size: int) -> None:
    assert Array(dtype, (2, 3)).nbytes == size


def test_an_instruction_reads_its_operands_and_writes_its_result() -> None:
    assert moved(X, "ROOT %y = f32[100,10]{1,0} exponential(%x)") == 8000


def test_what_is_kept_on_the_chip_moves_nothing() -> None:
    assert moved(X, "ROOT %y = f32[100,10]{1,0:T(8,128)S(1)} exponential(%x)") == 4000


def test_a_view_and_the_end_of_a_copy_move_nothing() -> None:
    start = "%s = (f32[100,10]{1,0:S(1)}, f32[100,10]{1,0}, u32[]) copy-start(%x)"
    done = "%d = f32[100,10]{1,0:S(1)} copy-done(%s)"
    assert moved(X, "%v = f32[1000]{0} bitcast(%x)") == 0
    assert moved(X, start, done) == 4000  # to the chip: read, not written


def test_a_slice_reads_what_it_takes() -> None:
    line = "ROOT %y = f32[5,10]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={5,10}"
    assert moved(X, AT, line) == 2 * 200


def test_an_update_in_place_touches_what_it_replaces() -> None:
    new = "%n = f32[1,10]{1,0} parameter(2)"
    assert (
        moved(X, AT, new, "ROOT %y = f32[100,10]{1,0} dynamic-update-slice(%x, %n, %i, %i)") == 80
    )


FUSED = """%inner (p: f32[100,10], q: s32[]) -> f32[5,10] {
  %p = f32[100,10]{1,0} parameter(0)
  %q = s32[] parameter(1)
  %v = f32[100,10]{1,0} bitcast(%p)
  ROOT %taken = f32[5,10]{1,0} dynamic-slice(%v, %q, %q), dynamic_slice_sizes={5,10}
}

%outer (a: f32[100,10], b: s32[]) -> f32[5,10] {
  %a = f32[100,10]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %part = f32[5,10]{1,0} fusion(%a, %b), kind=kLoop, calls=%inner
  ROOT %e = f32[5,10]{1,0} exponential(%part)
}"""


def test_a_fusion_that_takes_a_slice_reads_the_slice() -> None:
    line = "ROOT %y = f32[5,10]{1,0} fusion(%x, %i), kind=kLoop, calls=%outer"
    assert moved(X, AT, line, computations=FUSED) == 200 + 4 + 200


def test_a_slice_of_what_is_only_tiled_otherwise_reads_the_slice() -> None:
    bitcast = "%v = f32[100,10]{1,0} bitcast(%p)"
    tiled = "%v = f32[100,10]{1,0:T(8,128)} fusion(%p), kind=kLoop, "
    tiled += "output_to_operand_aliasing={{}: (0, {})}, calls=%copied"
    line = "ROOT %y = f32[5,10]{1,0} fusion(%x, %i), kind=kLoop, calls=%outer"
    computations = f"""%copied (r: f32[100,10]) -> f32[100,10] {{
  %r = f32[100,10]{{1,0}} parameter(0)
  ROOT %c = f32[100,10]{{1,0:T(8,128)}} copy(%r)
}}

{FUSED.replace(bitcast, tiled)}"""
    assert tiled in computations
    assert moved(X, AT, line, computations=computations) == 200 + 4 + 200


def test_a_fusion_that_reads_all_once_and_a_slice_reads_all_once() -> None:
    body = """%f (a: f32[100,10], b: s32[]) -> f32[5,10] {
  %a = f32[100,10]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %part = f32[5,10]{1,0} dynamic-slice(%a, %b, %b), dynamic_slice_sizes={5,10}
  %sum = f32[5,10]{1,0} reduce(%a, %b), dimensions={0}, to_apply=%add
  ROOT %e = f32[5,10]{1,0} add(%part, %sum)
}"""
    line = "ROOT %y = f32[5,10]{1,0} fusion(%x, %i), kind=kLoop, calls=%f"
    assert moved(X, AT, line, computations=body) == 4000 + 4 + 200


def test_a_fusion_that_only_looks_at_an_operand_within_another_one_reads_it() -> None:
    body = """%view (p: f32[100,10]) -> f32[1000] {
  %p = f32[100,10]{1,0} parameter(0)
  ROOT %v = f32[1000]{0} bitcast(%p)
}

%f (a: f32[100,10]) -> f32[1000] {
  %a = f32[100,10]{1,0} parameter(0)
  %b = f32[1000]{0} fusion(%a), kind=kLoop, calls=%view
  ROOT %e = f32[1000]{0} exponential(%b)
}"""
    line = "ROOT %y = f32[1000]{0} fusion(%x), kind=kLoop, calls=%f"
    assert moved(X, line, computations=body) == 8000


LOOP = """%body (t: (f32[100,10], s32[])) -> (f32[100,10], s32[]) {
  %t = (f32[100,10]{1,0}, s32[]) parameter(0)
  %a = f32[100,10]{1,0} get-tuple-element(%t), index=0
  %b = f32[100,10]{1,0} exponential(%a)
  ROOT %r = (f32[100,10]{1,0}, s32[]) tuple(%b, %b)
}"""
TUPLE = "%t = (f32[100,10]{1,0}, s32[]) tuple(%x, %i)"
WHILE = "%w = (f32[100,10]{1,0}, s32[]) while(%t), condition=%c, body=%body"


def test_a_loop_counts_as_often_as_it_is_known_to_run() -> None:
    known = WHILE + ', backend_config={"known_trip_count":{"n":"7"}}'
    assert moved(X, AT, TUPLE, known, computations=LOOP) == 7 * 8000
    assert moved(X, AT, TUPLE, WHILE, computations=LOOP, trips=3) == 3 * 8000


def test_a_step_is_the_loop_whose_end_nobody_knows_and_the_rest_is_once_a_call() -> None:
    made = program(X, AT, TUPLE, WHILE, "ROOT %y = f32[100,10]{1,0} negate(%x)", computations=LOOP)
    assert made.step() == "body"
    assert total(made.moves(made.step())) == 8000
    assert total(made.moves_once("body")) == 8000


def test_of_branches_the_dearest_counts() -> None:
    branches = "\n\n".join(
        f"%{name} (p: f32[{n}]) -> f32[{n}] {{\n  %p = f32[{n}]{{0}} parameter(0)\n"
        f"  ROOT %e = f32[{n}]{{0}} exponential(%p)\n}}"
        for name, n in (("little", 10), ("much", 50))
    )
    line = "ROOT %y = f32[50]{0} conditional(%i, %x, %x), branch_computations={%little, %much}"
    assert moved(X, AT, line, computations=branches) == 400


def test_products_are_two_operations_a_pair() -> None:
    w = "%w = f32[7,10]{1,0} parameter(2)"
    dot = "ROOT %y = f32[100,7]{1,0} dot(%x, %w), lhs_contracting_dims={1}"
    assert program(X, w, dot).flops() == 2 * 100 * 7 * 10
    convolution = "ROOT %y = f32[100,7]{1,0} convolution(%x, %w), dim_labels=bf_oi->bf"
    assert program(X, w, convolution).flops() == 2 * 100 * 7 * 10


def test_collectives_are_counted_and_whether_work_hides_them() -> None:
    start = "%s = (f32[100,10]{1,0}, f32[100,10]{1,0}) all-reduce-start(%x), replica_groups={}"
    work = "%f = f32[100,10]{1,0} fusion(%x), kind=kLoop, calls=%inner"
    done = "%d = f32[100,10]{1,0} all-reduce-done(%s)"
    late = "ROOT %l = f32[100,10]{1,0} all-reduce(%d), replica_groups={}"
    made = program(X, start, work, done, late, computations=FUSED)
    assert made.collectives() == {"all-reduce": (2, 8000)}
    assert made.asynchronous() == (1, 1)


def test_a_copy_of_a_ring_is_one_from_memory_to_memory() -> None:
    ring = "%x = bf16[1,8,64,16]{3,2,1,0} parameter(0)"
    to_chip = "%a = bf16[8,64,16]{2,1,0:S(1)} copy(%x)"
    in_memory = "ROOT %b = bf16[64,8,16]{2,1,0} copy(%x)"
    assert program(ring, to_chip).copies((1, 8, 64, 16)) == 0
    assert program(ring, to_chip, in_memory).copies((1, 8, 64, 16)) == 1
