"""Tests of the parser of optimised HLO, on texts in the TPU compiler's format written for these tests."""

from pathlib import Path

import pytest

from diva_jax.costs import chips, hlo

# A step with a loop of three iterations, a fused product and a kernel inside it, an asynchronous copy and an
# all-reduce.
TEXT = (Path(__file__).parent / "step.hlo.txt").read_text()


@pytest.fixture(scope="module")
def report():
    return hlo.analyse(TEXT, chips.CHIPS["v5e"])


def test_operations_in_loops_count_once_per_iteration(report):
    product, kernel = 2 * 32 * 64 * 16, 2 * 2 * 2 * 4 * 64 * 256 * 128
    assert report["flops"] == 3 * product
    assert report["kernel_flops"] == 3 * kernel
    assert report["kernel_ms"] == pytest.approx(1e3 * 3 * kernel / 197e12)
    assert report["model_ms"] == pytest.approx(1e3 * (3 * 1500 + 3000) / 1.5e9)
    assert report["kernels"] == {"flash_forward_d64": 3}


@pytest.mark.parametrize(("chip", "wide"), [("v5e", 128), ("v4", 128), ("v6e", 256)])
def test_kernels_at_the_bound_of_their_shape(chip, wide):
    """Sums over heads of 64 take the time of sums as long as the matrix unit is wide; rows are not padded."""
    peak = chips.CHIPS[chip].flops

    def analysed(keys):
        return hlo.analyse(TEXT.replace("bf16[2,256,128]", f"bf16[2,256,{keys}]"), chips.CHIPS[chip])

    report = analysed(2**20)
    product = 3 * 2 * 2 * 4 * 256 * 2**20
    assert report["kernel_ms"] == pytest.approx(1e3 * product * 2 * 64 / peak)
    assert report["kernel_bound_ms"] == pytest.approx(1e3 * product * (64 + wide) / peak)
    assert report["parts"]["unet forward"]["kernel_bound_ms"] == report["kernel_bound_ms"]
    # With few keys, the time is that of reading and writing operands and results once.
    moved = 3 * (4 * 512 * 128 + 2 * (2 * 256 * (256 + 256 + 128 + 128)))
    assert analysed(128)["kernel_bound_ms"] == pytest.approx(1e3 * moved / chips.CHIPS[chip].hbm_bandwidth)


@pytest.mark.parametrize(("chip", "channels", "hidden"), [("v5e", 384, 1280), ("v6e", 512, 1280)])
@pytest.mark.parametrize(("direction", "narrow"), [("forward", 2), ("backward", 1)])
def test_feed_forward_kernels_at_the_bound_of_their_shape(chip, channels, hidden, direction, narrow):
    """Sums over 320 channels take the time of the next multiple of the unit's side; rows of 320 do not."""
    text = TEXT.replace("flash_forward_d64", f"feed_forward_{direction}_h1280").replace("[2,256,256]", "[2,320,4096]")
    found, peak = hlo.analyse(text, chips.CHIPS[chip]), chips.CHIPS[chip].flops
    product = 3 * 2 * 2 * 4096
    assert found["kernel_flops"] == product * 3 * 320 * 1280
    bound = product * (narrow * channels * 1280 + (3 - narrow) * 320 * hidden)
    assert found["kernel_bound_ms"] == pytest.approx(1e3 * bound / peak)


def test_parts_and_kinds(report):
    parts = report["parts"]
    assert parts["unet backward"]["kinds"] == {"matmul": pytest.approx(1e3 * 3 * 1500 / 1.5e9)}
    assert parts["unet forward"]["kernel_flops"] == report["kernel_flops"]
    assert parts["optimizer"]["model_ms"] == pytest.approx(0.002)
    assert "vision forward" not in parts, "the name of a parameter is not an operation"


def test_traffic_counts_arrays_in_hbm_only_and_collectives_once(report):
    fusion = 2 * 32 * 64 + 2 * 32 * 16  # The second operand is on-chip.
    assert report["parts"]["unet backward"]["hbm_gb"] * 1e9 == pytest.approx(3 * fusion)
    copied, reduced = 4 * 800, 4 * 800  # The all-reduce reads the copy, which is on-chip.
    # The copy has no path, so it has the path of the all-reduce that reads it.
    assert report["parts"]["optimizer"]["hbm_gb"] * 1e9 == pytest.approx(reduced + copied)
    assert "other" not in report["parts"]
    assert report["collectives"] == {"all-reduce": {"count": 1, "gb": pytest.approx(3200 / 1e9)}}


def test_collectives_inside_of_fusions():
    """An asynchronous all-gather counts once; an all-reduce followed by a slice is a reduce-scatter."""
    text = """
%start (p: bf16[16,64]) -> bf16[64,64] {
  %p = bf16[16,64]{1,0} parameter(0)
  ROOT %gather.1 = bf16[64,64]{1,0} all-gather(%p), channel_id=3, dimensions={0}
}

%done (p: bf16[16,64]) -> bf16[64,64] {
  %p = bf16[16,64]{1,0} parameter(0)
  ROOT %gather.2 = bf16[64,64]{1,0} all-gather(%p), channel_id=3, dimensions={0}
}

%scatter (p: f32[64,64]) -> f32[16,64] {
  %p = f32[64,64]{1,0} parameter(0)
  %sum = f32[64,64]{1,0} all-reduce(%p), channel_id=4, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[16,64]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={16,64}
}

ENTRY %main (x: bf16[16,64], y: f32[64,64]) -> f32[16,64] {
  %x = bf16[16,64]{1,0} parameter(0)
  %y = f32[64,64]{1,0} parameter(1)
  %a = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%start
  %b = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%done
  ROOT %c = f32[16,64]{1,0} fusion(%y), kind=kCustom, calls=%scatter
}
"""
    assert hlo.analyse(text, chips.CHIPS["v5e"])["collectives"] == {
        "all-gather": {"count": 1, "gb": pytest.approx(2 * 64 * 64 / 1e9)},
        "reduce-scatter": {"count": 1, "gb": pytest.approx(4 * 64 * 64 / 1e9)},
    }


@pytest.mark.parametrize(("dims", "window", "pairs"), [
    # 3x3 over 8x8, padded by one: 8 + 7 + 7 pairs per axis.
    ((8, 3, 8), "size=3x3 pad=1_1x1_1", 22 * 22),
    # Stride 2 with padding (0, 1): the three kernel positions read 0, 2, 4, 6; 1, 3, 5, 7; and 2, 4, 6.
    ((8, 3, 4), "size=3x3 stride=2x2 pad=0_1x0_1", 11 * 11),
    # The backward pass of that: four pixels with input dilation two.
    ((4, 3, 8), "size=3x3 pad=2_1x2_1 lhs_dilate=2x2", 11 * 11),
])  # fmt: skip
def test_convolutions_do_not_count_padding(dims, window, pairs):
    size, taps, out = dims
    text = f"""
ENTRY %main (x: f32[]) -> f32[] {{
  %x = f32[2,{size},{size},5]{{3,2,1,0}} parameter(0)
  %k = f32[{taps},{taps},5,7]{{3,2,1,0}} parameter(1)
  ROOT %c = f32[2,{out},{out},7]{{3,2,1,0}} convolution(%x, %k), window={{{window}}}, dim_labels=b01f_01io->b01f
}}
"""
    module = hlo.parse(text)
    main = module.computations["main"]
    assert module.flops(main["c"], main) == 2 * 2 * 5 * 7 * pairs


def test_text_without_an_entry_computation():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("hello")
