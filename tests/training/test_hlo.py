"""Counts read from compiled programs: loops, collectives and their bytes in every spelling."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.training import hlo
from jaxdiff.training.mesh import make_mesh

MESH = make_mesh(data=2, fsdp=4)
WHOLE = PartitionSpec()


def compiled(function, *arguments):
    with jax.set_mesh(MESH):
        return jax.jit(function).lower(*arguments).compile()


def shape(*sides, spec=WHOLE):
    return jax.ShapeDtypeStruct(sides, jnp.float32, sharding=NamedSharding(MESH, spec))


def test_bytes_of_collectives_that_the_compiler_wrote():
    whole = NamedSharding(MESH, WHOLE)
    gathered = compiled(
        lambda x: jax.lax.with_sharding_constraint(x, whole) * 2, shape(64, 32, spec=PartitionSpec(None, "fsdp"))
    )
    found = hlo.read(gathered.as_text(), 8).collectives
    assert set(found) == {"all-gather"}
    assert (found["all-gather"].count, found["all-gather"].bytes) == (1, 64 * 32 * 4 * 3 / 4)
    summed = compiled(lambda x: x.sum(0), shape(64, 32, spec=PartitionSpec(("data", "fsdp"))))
    found = hlo.read(summed.as_text(), 8).collectives
    assert (found["all-reduce"].count, found["all-reduce"].bytes) == (1, 2 * 32 * 4 * 7 / 8)


def test_loops_count_as_often_as_they_run():
    def chain(x, kernels):
        def body(x, kernel):
            kernel = jax.lax.with_sharding_constraint(kernel, PartitionSpec())
            return jnp.tanh(x @ kernel), None

        return jax.lax.scan(body, x @ kernels[0], kernels)[0]

    program = hlo.read(
        compiled(chain, shape(8, 64), shape(5, 64, 64, spec=PartitionSpec(None, None, "fsdp"))).as_text(), 8
    )
    assert program.unknown_loops == 0
    assert program.loop_factor == pytest.approx(6 / 2)
    gathers = program.collectives["all-gather"]
    assert gathers.count >= 5 and gathers.bytes >= 5 * 64 * 64 * 4 * 3 / 4


def test_without_loops_the_compilers_count_stands():
    text = compiled(lambda x, k: x @ k, shape(8, 64), shape(64, 64)).as_text()
    program = hlo.read(text, 8)
    assert (program.loop_factor, program.unknown_loops, program.collectives) == (1.0, 0, {})


LOOP = """HloModule made_up

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (x: bf16[16,8]) -> bf16[4,8] {
  %x = bf16[16,8]{1,0} parameter(0)
  %sum = bf16[16,8]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = bf16[4,8]{1,0} dynamic-slice(%sum, %o, %o), dynamic_slice_sizes={4,8}
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]) parameter(0)
  %x = bf16[4,8] get-tuple-element(%p), index=1
  %start = (bf16[4,8], bf16[16,8]) all-gather-start(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %whole = bf16[16,8] all-gather-done(%start)
  %scattered = bf16[4,8] fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.1
  %moved = bf16[4,8] collective-permute(%scattered), source_target_pairs={{0,1}}
  ROOT %out = (s32[], bf16[4,8]) tuple(%i, %moved)
}

ENTRY %main (x: (s32[], bf16[4,8])) -> f32[8,128] {
  %x = (s32[], bf16[4,8]) parameter(0)
  %loop = (s32[], bf16[4,8]) while(%x), condition=%condition, body=%body
  %k = bf16[3,3,16,32]{3,2,1,0} parameter(1)
  %y = bf16[2,8,8,16]{3,2,1,0} parameter(2)
  %conv = bf16[2,8,8,32]{3,2,1,0} convolution(%y, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, NOTES
  ROOT %all = f32[8,128] all-to-all(%z), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}
""".replace("NOTES", 'metadata={op_name="jit(f)/transpose(jvp())/conv"}, backend_config={"estimated_cycles":"1200"}')
MAXIMUM = 9223372036854775807


def test_every_spelling():
    program = hlo.read(LOOP, 8)
    counts = {kind: (found.count, found.bytes) for kind, found in program.collectives.items()}
    assert counts == {
        "all-gather": (7, 7 * 16 * 8 * 2 * 3 / 4),
        "reduce-scatter": (7, 7 * 16 * 8 * 2 * 3 / 4),
        "collective-permute": (7, 7 * 4 * 8 * 2),
        "all-to-all": (1, 8 * 128 * 4 * 3 / 4),
    }
    assert program.loop_factor == 1.0  # the convolution is not in the loop
    assert program.cycles == {"convolution: backward conv": 1200}
    assert not hlo.read(LOOP.replace('"1200"', f'"{MAXIMUM}"'), 8).cycles  # how tpu7x's compiler says that it has none


FUSED = """HloModule made_up

%first (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8] parameter(0)
  ROOT %whole = bf16[16,8] all-gather(%x), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%second (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8] parameter(0)
  ROOT %whole = bf16[16,8] all-gather(%x), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

ENTRY %main (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8] parameter(0)
  %begun = bf16[16,8] fusion(%x), kind=kCustom, calls=%first
  %another = bf16[16,8] all-gather(%x), replica_groups=[2,4]<=[8]
  ROOT %ended = bf16[16,8] fusion(%x), kind=kCustom, calls=%second
}
"""


def test_a_collective_that_goes_on_in_several_fusions_is_one():
    (gathers,) = hlo.read(FUSED, 8).collectives.values()
    assert (gathers.count, gathers.bytes) == (2, 2 * 16 * 8 * 2 * 3 / 4)


@pytest.mark.parametrize(
    ("begun", "received"),
    [
        ("((f32[5], f32[30]), (f32[20], f32[120])) all-gather-start(%x, %y)", 4 * 140 * 3 / 4),
        ("(f32[20], f32[30], /*index=2*/f32[40]) all-reduce-start(%x, %y, %z)", 2 * 4 * 90 * 3 / 4),
        ("f32[20] all-reduce-start(%x)", 2 * 4 * 20 * 3 / 4),
        ("(f32[20], f32[20], u32[], u32[]) collective-permute-start(%x)", 4 * 20),
    ],
)
def test_what_an_asynchronous_collective_receives(begun, received):
    line = f"  ROOT %begun = {begun}, replica_groups=[2,4]<=[8]"
    (found,) = hlo.read(f"ENTRY %main (x: f32[5]) -> f32[20] {{\n{line}\n}}", 8).collectives.values()
    assert (found.count, found.bytes) == (1, received)


def test_a_loop_without_a_length_is_said():
    program = hlo.read(LOOP.replace("direction=LT", "direction=NE"), 8)
    assert program.unknown_loops == 1 and program.collectives["all-gather"].count == 1


def test_flops_of_a_convolution_are_its_own():
    wanted = 2 * 2 * 8 * 8 * 32 * 9 * 16
    instructions = hlo._computations(LOOP)[0]["main"]
    found = map(partial(hlo._flops, shapes={line.name: line.shape for line in instructions}), instructions)
    assert sum(found) == wanted


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.read("nothing", 8)


GPU = """HloModule made_up

%product (p: bf16[8192,96], q: bf16[96,128]) -> bf16[8192,128] {
  %p = bf16[8192,96]{1,0} parameter(0)
  %q = bf16[96,128]{1,0} parameter(1)
  ROOT %dot = bf16[8192,128]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (p: (s32[], bf16[8192,96])) -> (s32[], bf16[8192,96]) {
  %p = (s32[], bf16[8192,96]) parameter(0)
  %y = bf16[8192,96] get-tuple-element(%p), index=1
  %w = bf16[96,128] constant({...})
  %z = bf16[8192,128]{1,0} fusion(%y, %w), kind=kCustom, calls=%product
  %g = (bf16[8192,96]{1,0}, s8[4096]{0}) custom-call(%z, %w), custom_call_target="__cublas$lt$matmul", PRODUCT
  %t = bf16[8192,96]{1,0} get-tuple-element(%g), index=0
  ROOT %out = (s32[], bf16[8192,96]) tuple(%i, %t)
}

ENTRY %main (x: bf16[8,32,32,64], k: bf16[96,3,3,64], q: bf16[8,64,4,64], kv: bf16[8,78,4,64]) -> bf16[96,3,3,64] {
  %x = bf16[8,32,32,64]{3,2,1,0} parameter(0)
  %k = bf16[96,3,3,64]{3,2,1,0} parameter(1)
  %q = bf16[8,64,4,64]{3,2,1,0} parameter(2)
  %kv = bf16[8,78,4,64]{3,2,1,0} parameter(3)
  %conv = (bf16[8,16,16,96]{3,2,1,0}, u8[9]{0}) custom-call(%x, %k), WINDOW, cuDNN$convForward"
  %y = bf16[8,16,16,96]{3,2,1,0} get-tuple-element(%conv), index=0
  %dx = (bf16[8,32,32,64]{3,2,1,0}, u8[9]{0}) custom-call(%y, %k), WINDOW, cuDNN$convBackwardInput"
  %dk = (bf16[96,3,3,64]{3,2,1,0}, u8[9]{0}) custom-call(%x, %y), WINDOW, cuDNN$convBackwardFilter"
  %a = (bf16[8,4,64,64]{3,1,2,0}, f32[8,4,64]{2,1,0}, u8[9]{0}) custom-call(%q, %kv, %kv), cuDNN$fmhaSoftmax"
  %b = bf16[8,4,64,64]{3,1,2,0} get-tuple-element(%a), index=0
  %d = (bf16[8,4,64,64], u8[9]) custom-call(%q, %kv, %kv, %b, %b, /*index=5*/%b), cuDNN$fmhaSoftmaxBackward"
  %loop = (s32[], bf16[8192,96]) while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %sort = bf16[8] custom-call(%x), custom_call_target="__cub$DeviceRadixSort"
  ROOT %r = bf16[96,3,3,64]{3,2,1,0} get-tuple-element(%dk), index=0
}
"""
GPU = GPU.replace("WINDOW", "window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_o01i->b01f")
GPU = GPU.replace("cuDNN$", 'custom_call_target="__cudnn$')
GPU = GPU.replace("PRODUCT", 'backend_config={"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}')


def test_what_libraries_of_nvidia_compute():
    program = hlo.read(GPU, 1)
    convolution, product, attention = 2 * 8 * 16 * 16 * 96 * 9 * 64, 2 * 8192 * 96 * 128, 2 * 8 * 4 * 64 * 78 * 64
    assert program.flops == 3 * convolution + 3 * 2 * product + (2 + 5) * attention
    assert program.loop_factor == pytest.approx(program.flops / (program.flops - 2 * 2 * product))
    assert program.kernels == 3 * 2 + 6  # the instructions inside of a fusion are no kernels


def test_what_kernels_move():
    """Operands and results, in loops as often as they run; no workspaces."""
    program = hlo.read(GPU, 1)
    x, k, y = 8 * 32 * 32 * 64, 96 * 9 * 64, 8 * 16 * 16 * 96
    q, kv, a = 8 * 64 * 4 * 64, 8 * 78 * 4 * 64, 8 * 4 * 64 * 64
    arrays = (
        3 * (x + k + y) + (q + 2 * kv + a) + (q + 2 * kv + 4 * a) + (x + 8) + 3 * 2 * (8192 * (96 + 128) + 96 * 128)
    )
    assert program.bytes == 2 * arrays + 8 * 4 * 64 * 4  # the sums of the softmax are float32
    assert hlo.read(GPU.replace("u8[9]", "u8[99]").replace("s8[4096]", "s8[8192]"), 1).bytes == program.bytes


def test_a_program_without_products_has_no_flops():
    body = "%x = f32[4]{0} parameter(0)\n  ROOT %y = f32[4]{0} negate(%x)"
    program = hlo.read(f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  {body}\n}}", 1)
    assert (program.flops, program.bytes, program.kernels, program.loop_factor) == (0.0, 32.0, 1, 1.0)
