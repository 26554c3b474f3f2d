"""What a step needs: the FLOPs of its trace, the bytes of its compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

for _module in ("flax", "grain", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from examples.training.attention import attend
from examples.training.chips import Chip, chip_of
from examples.training.hlo import arrays, parse
from examples.training.roofline import matrix_flops, roofline
from examples.training.traffic import Collective, collectives, memory_traffic

A = jax.ShapeDtypeStruct((8, 32), jnp.float32)
B = jax.ShapeDtypeStruct((32, 16), jnp.float32)
PRODUCT = 2 * 8 * 32 * 16


def in_a_loop(a, b):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x), a @ b), 0.0, length=5)[1]


def with_gradient(a, b):
    return jax.value_and_grad(lambda *x: ((x[0] @ x[1]) ** 2).sum(), argnums=(0, 1))(
        a, b
    )


def recomputed(a, b):
    product = jax.checkpoint(lambda *x: jnp.tanh(x[0] @ x[1]).sum())
    return jax.value_and_grad(product, argnums=(0, 1))(a, b)


def dearest_branch(a, b):
    return jax.lax.cond(a[0, 0] > 0, lambda: 0.0, lambda: (a @ b).sum())


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (jnp.matmul, 1),
        (jax.jit(jnp.matmul), 1),
        (lambda a, b: a[:, None] @ b, 1),
        (in_a_loop, 5),
        (with_gradient, 3),
        (recomputed, 4),
        (dearest_branch, 1),
        (lambda a, b: a + b.sum(), 0),
    ],
)
def test_the_flops_of_matrix_products(function, products):
    jaxpr = jax.make_jaxpr(function)(A, B).jaxpr
    assert matrix_flops(jaxpr) == products * PRODUCT


def test_flops_on_a_mesh_are_those_of_all_devices():
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=axes)
    product = jax.shard_map(
        jnp.matmul,
        mesh=mesh,
        in_specs=(P("x"), P()),
        out_specs=P("x"),
        axis_names={"x"},
    )
    assert matrix_flops(jax.make_jaxpr(product)(A, B).jaxpr) == PRODUCT


def test_the_flops_of_an_attention_kernel():
    """Two products forward; five backward, one of which recomputes the scores."""
    x = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.float32)
    one = 2 * 2 * 4 * 128 * 128 * 64

    def flops(kernel):
        def total(*inputs):
            return attend(*inputs, causal=True, kernel=kernel, interpret=True).sum()

        forward = jax.make_jaxpr(total)(x, x, x).jaxpr
        backward = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(x, x, x).jaxpr
        return matrix_flops(forward) / one, matrix_flops(backward) / one

    assert flops("xla") == (2, 6)
    # A row sum is written as a product.
    assert flops("splash") == pytest.approx((2, 7), abs=0.01)


def test_products_that_cannot_be_counted_are_reported():
    def repeated(a, b):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ b @ b.T, a)

    with pytest.raises(NotImplementedError, match="products in a while"):
        matrix_flops(jax.make_jaxpr(repeated)(A, B).jaxpr)


def test_the_slowest_part_bounds_the_utilization():
    chip = Chip(flops=100.0, memory=10.0, links=5.0, source="")
    counts = {"flops": 400.0, "accessed": 50.0, "received": 10.0, "model_flops": 300.0}
    line = roofline(chip, **counts)
    assert line.times == {"compute": 4.0, "memory": 5.0, "links": 2.0}
    assert (line.shortest, line.limit, line.utilization) == (5.0, "memory", 0.6)
    line = roofline(chip, **{**counts, "accessed": 30.0})
    assert (line.shortest, line.limit, line.utilization) == (4.0, "compute", 0.75)


def test_an_unknown_chip_has_no_peak_rates():
    assert chip_of(jax.devices()[0]) is None


@pytest.mark.parametrize(
    ("text", "size", "in_memory"),
    [
        ("f32[10,20]{1,0}", 800, 800),
        ("bf16[10,20]{1,0:T(8,128)(2,1)}", 400, 2 * 16 * 128),
        ("bf16[10,20]{0,1:T(8,128)(2,1)}", 400, 2 * 128 * 24),
        ("f32[3,8,128]{2,1,0:T(8,128)}", 12288, 12288),
        ("f32[100]{0:T(1024)}", 400, 4096),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 4096, 0),
        ("s32[]", 4, 4),
    ],
)
def test_sizes_of_arrays(text, size, in_memory):
    (array,) = arrays(text)
    assert (array.size, array.in_memory) == (size, in_memory)


PROGRAM = """HloModule step

%add (p.8: f32[], p.9: f32[]) -> f32[] {
  %p.8 = f32[] parameter(0)
  %p.9 = f32[] parameter(1)
  ROOT %a.1 = f32[] add(%p.8, %p.9)
}

%sliced (p.0: f32[6,8,128], p.1: s32[]) -> f32[1,8,128] {
  %p.0 = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %p.1 = s32[] parameter(1)
  %b.0 = f32[6,8,128]{2,1,0:T(8,128)} bitcast(%p.0)
  ROOT %d.0 = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%b.0, %p.1, %p.1, %p.1)
}

%updated (p.2: f32[6,8,128], p.3: f32[1,8,128], p.4: s32[]) -> (f32[6,8,128], s32[]) {
  %p.2 = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %p.3 = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
  %p.4 = s32[] parameter(2)
  %u.0 = f32[6,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p.2, %p.3, %p.4)
  ROOT %t.0 = (f32[6,8,128]{2,1,0:T(8,128)}, s32[]) tuple(%u.0, %p.4)
}

%body (p.5: (s32[], f32[6,8,128])) -> (s32[], f32[6,8,128]) {
  %p.5 = (s32[], f32[6,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i.0 = s32[] get-tuple-element(%p.5), index=0
  %x.0 = f32[6,8,128]{2,1,0:T(8,128)} get-tuple-element(%p.5), index=1
  %f.0 = f32[1,8,128]{2,1,0:T(8,128)} fusion(%x.0, %i.0), kind=kLoop, calls=%sliced
  %a.0 = f32[1,8,128]{2,1,0:T(8,128)} all-reduce(%f.0), channel_id=1, \
replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  %f.1 = (f32[6,8,128]{2,1,0:T(8,128)}, s32[]) fusion(%x.0, %a.0, %i.0), kind=kLoop, \
calls=%updated
  %x.1 = f32[6,8,128]{2,1,0:T(8,128)} get-tuple-element(%f.1), index=0
  ROOT %t.1 = (s32[], f32[6,8,128]{2,1,0:T(8,128)}) tuple(%i.0, %x.1)
}

%condition (p.6: (s32[], f32[6,8,128])) -> pred[] {
  %p.6 = (s32[], f32[6,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.6), index=0
  %c.0 = s32[] constant(6)
  ROOT %l.0 = pred[] compare(%i.1, %c.0), direction=LT
}

ENTRY %main (p.7: f32[6,8,128]) -> f32[6,8,128] {
  %p.7 = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %c.1 = s32[] constant(0)
  %s.0 = (f32[6,8,128]{2,1,0:T(8,128)S(1)}, f32[6,8,128]{2,1,0:T(8,128)}, u32[]) \
copy-start(%p.7)
  %s.1 = f32[6,8,128]{2,1,0:T(8,128)S(1)} copy-done(%s.0)
  %n.0 = f32[6,8,128]{2,1,0:T(8,128)} negate(%s.1)
  %t.2 = (s32[], f32[6,8,128]{2,1,0:T(8,128)}) tuple(%c.1, %n.0)
  %w.0 = (s32[], f32[6,8,128]{2,1,0:T(8,128)}) while(%t.2), condition=%condition, \
body=%body
  ROOT %x.2 = f32[6,8,128]{2,1,0:T(8,128)} get-tuple-element(%w.0), index=1
}
"""
LAYER = 4 * 8 * 128
INDEX = 4


def test_the_memory_traffic_of_a_program():
    """Loops, slices, updates in place, and arrays in vector memory."""
    entry = 6 * LAYER + 6 * LAYER  # Read by the prefetch; written by the negation.
    slice_ = LAYER + INDEX + LAYER  # Read, with the index, and written.
    all_reduce = LAYER + LAYER
    update = LAYER + INDEX + LAYER
    assert memory_traffic(parse(PROGRAM)) == entry + 6 * (slice_ + all_reduce + update)


def test_the_collectives_of_a_program():
    size = 6 * LAYER
    expected = Collective(times=6, bytes=size, received=2 * 3 / 4 * size)
    assert collectives(parse(PROGRAM)) == {"all-reduce": expected}


@pytest.mark.parametrize(
    ("operation", "attributes", "size", "received"),
    [
        ("all-gather", "replica_groups={{0,1,2,3},{4,5,6,7}}", 4096, 3072),
        ("all-gather", "replica_groups=[2,4]<=[8]", 4096, 3072),
        ("all-to-all", "replica_groups=[1,8]<=[8]", 4096, 3584),
        (
            "all-gather",
            "replica_groups=mesh['x'=1,'y'=4,'z'=2], device_ids=([2,4]T(1,0)) "
            "{'y', 'z'}, use_global_device_ids=true",
            4096,
            3584,
        ),
        ("reduce-scatter", "replica_groups=[2,4]<=[8]", 4096, 3 * 4096),
        ("collective-permute", "source_target_pairs={{0,1},{1,0}}", 4096, 4096),
    ],
)
@pytest.mark.parametrize("start", [False, True])
def test_bytes_received(operation, attributes, size, received, start):
    result = "f32[8,128]{1,0}"
    if start:
        result = f"(f32[2,128]{{1,0}}, {result}, u32[])"
    text = f"""ENTRY %main (p.0: f32[2,128]) -> f32[8,128] {{
  %p.0 = f32[2,128]{{1,0}} parameter(0)
  ROOT %a.0 = {result} {operation}{"-start" * start}(%p.0), channel_id=3, {attributes}
}}"""
    found = collectives(parse(text))
    assert found == {operation: Collective(1, size, received)}


def test_an_array_that_a_fusion_creates_is_written_whole():
    created = PROGRAM.replace(
        "  %u.0 = f32[6,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p.2",
        "  %z.0 = f32[] constant(0)\n"
        "  %w.1 = f32[6,8,128]{2,1,0:T(8,128)} broadcast(%z.0), dimensions={}\n"
        "  %u.0 = f32[6,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%w.1",
    )
    more = memory_traffic(parse(created)) - memory_traffic(parse(PROGRAM))
    assert more == 6 * 5 * LAYER


def test_each_collective_counts_whatever_its_channel():
    """Unrelated ones may have the same channel."""
    line = "  %x.1 = f32[6,8,128]{2,1,0:T(8,128)} get-tuple-element(%f.1), index=0\n"
    second = (
        "  %a.2 = f32[1,8,128]{2,1,0:T(8,128)} all-reduce(%f.0), channel_id=1, "
        "replica_groups=[2,4]<=[8], to_apply=%add\n"
    )
    assert line in PROGRAM
    found = collectives(parse(PROGRAM.replace(line, second + line)))
    assert found["all-reduce"].times == 12


FUSED = """%{computation} (p.0: f32[8,128]) -> f32[8,128] {{
  %p.0 = f32[8,128]{{1,0}} parameter(0)
  ROOT %c.0 = f32[8,128]{{1,0}} {operation}(%p.0), channel_id=3, \
replica_groups=[2,4]<=[8]
}}

ENTRY %main (p.1: f32[8,128]) -> f32[8,128] {{
  %p.1 = f32[8,128]{{1,0}} parameter(0)
  ROOT %{fusion} = f32[8,128]{{1,0}} fusion(%p.1), kind=kCustom, calls=%{computation}
}}
"""


@pytest.mark.parametrize(
    ("fusion", "computation", "operation", "counts"),
    [
        ("async-collective-start.1", "fused.1", "all-gather", True),
        ("fusion.1", "async_collective_fusion.1", "all-gather", False),
        ("async-collective-done.1", "fused.1", "all-gather", False),
    ],
)
def test_a_fused_asynchronous_collective_counts_where_it_starts(
    fusion, computation, operation, counts
):
    text = FUSED.format(fusion=fusion, computation=computation, operation=operation)
    expected = {operation: Collective(1, 4096, 3 / 4 * 4096)} if counts else {}
    assert collectives(parse(text)) == expected


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    text = FUSED.format(
        fusion="f.1", computation="all-reduce-scatter.1", operation="all-reduce"
    )
    assert collectives(parse(text)) == {"reduce-scatter": Collective(1, 1024, 3 * 1024)}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("direction=LT", "direction=GT", "iterations of w.0"),
        ("%c.0 = s32[] constant(6)", "%c.0 = f32[] constant(6)", "iterations of w.0"),
        (
            "%n.0 = f32[6,8,128]{2,1,0:T(8,128)} negate(",
            "%n.0 = f32[] conditional(",
            "branches of a conditional",
        ),
    ],
)
def test_programs_that_cannot_be_counted_are_reported(old, new, message):
    assert old in PROGRAM
    with pytest.raises(NotImplementedError, match=message):
        memory_traffic(parse(PROGRAM.replace(old, new)))


def test_an_unknown_dtype_is_reported():
    with pytest.raises(ValueError, match="unknown dtype in a program: f7"):
        memory_traffic(parse(PROGRAM.replace("f32[6,8,128]", "f7[6,8,128]")))


def test_an_unknown_group_of_devices_is_reported():
    text = PROGRAM.replace("replica_groups=mesh['x'=2,'y'=4] {'y'}", "groups=all")
    with pytest.raises(ValueError, match="unknown devices of a collective operation"):
        collectives(parse(text))
