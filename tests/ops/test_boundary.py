"""How a boundary is stored: rounding against its definition, and the bytes against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stackwise.ops.boundary import (
    FORMATS,
    BoundaryLayout,
    boundary_format,
    bytes_per_row,
    largest_count,
    round_boundary,
)

LAYOUT = BoundaryLayout(batch_size=2, seq_len=3, width=131, first=5, count=7, format="bfloat16")


def hidden(batch: int) -> Tensor:
    """Values of many magnitudes, other ones for each batch."""
    g = torch.Generator().manual_seed(batch)
    return torch.randn(LAYOUT.shape, generator=g) * torch.exp2(torch.randint(-9, 9, LAYOUT.shape, generator=g))


def bits(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def test_float32_is_stored_exactly() -> None:
    x = hidden(1)
    assert bits(round_boundary(x, "float32")) == bits(x)


def test_bfloat16_is_stored_as_torch_rounds_it() -> None:
    x = hidden(1)
    assert bits(round_boundary(x, "bfloat16")) == bits(x.bfloat16().float())


def power_of_two_scale(group: Tensor) -> float:
    """The least power of two with max|x| / scale ≤ 448, by its definition."""
    largest = float(group.abs().max())
    scale = 2.0**-126
    while largest / scale > 448:
        scale *= 2
    return scale


@pytest.mark.parametrize("C", [1, 128, 131, 257])
def test_fp8_divides_each_group_of_128_by_the_least_power_of_two_that_fits(C: int) -> None:
    x = hidden(1).repeat(1, 1, 2)[..., :C]
    decoded = round_boundary(x, "fp8")
    for row, out in zip(x.reshape(-1, C), decoded.reshape(-1, C)):
        for group, found in zip(row.split(128), out.split(128)):
            scale = power_of_two_scale(group)
            expected = (group / scale).to(torch.float8_e4m3fn).float() * scale
            assert bits(found) == bits(expected)


def test_fp8_error_is_at_most_a_sixteenth_of_each_value_above_the_subnormal_range() -> None:
    x = hidden(1)[..., :128]
    error = (round_boundary(x, "fp8").double() - x.double()).abs()
    largest = x.abs().amax(-1, keepdim=True).double()
    normal = x.abs() >= 2**-6 * largest / 224  # scale < largest / 224
    assert normal.any() and not normal.all()
    assert bool((error <= 2**-4 * x.abs().double())[normal].all())
    assert bool((error <= 2**-10 * largest / 224).logical_or(normal).all())
    assert float((error / x.abs())[normal].max()) > 2**-5  # the bound is near


@pytest.mark.parametrize(
    ("largest", "power"),
    [
        (448.0, 0),
        (math.nextafter(448.0, 0), 0),
        (448.0000305, 1),
        (1.0, -8),
        (1.75, -8),
        (1.8, -7),
        (3.2e38, 120),
        (448 * 2.0**-126, -126),
        (449 * 2.0**-126, -125),
        (1e-45, -126),
        (0.0, -126),
    ],
)
def test_fp8_scales_by_the_least_power_of_two_that_brings_the_largest_to_448(largest: float, power: int) -> None:
    x = torch.tensor([largest / 3, -largest, 0.0])
    codes, exponent = boundary_format("fp8").encode(x)
    assert int(exponent) - 127 == power
    assert float(codes.float().abs().max()) <= 448
    assert bool((round_boundary(x, "fp8") - x).abs().le(2**-4 * x.abs() + 2.0 ** (power - 10)).all())


def test_fp8_of_a_rounded_boundary_is_itself_and_is_exact_in_bfloat16() -> None:
    once = round_boundary(hidden(1), "fp8")
    assert bits(round_boundary(once, "fp8")) == bits(once)
    assert bits(round_boundary(hidden(1), "fp8", torch.bfloat16).float()) == bits(once)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_fp8_keeps_what_is_not_finite_visible_in_its_group_alone(value: float) -> None:
    x = hidden(1)[0]
    x[1, 3] = value
    found = round_boundary(x, "fp8")
    assert bool(found[1, :128].isnan().all())
    assert bool(found[1, 128:].isfinite().all() and found[0].isfinite().all())


@pytest.mark.parametrize(
    ("format", "C", "expected"),
    [("float32", 131, 524), ("bfloat16", 131, 262), ("fp8", 131, 133), ("fp8", 128, 129), ("fp8", 8192, 8256)],
)
def test_bytes_per_row_are_those_of_the_parts(format: str, C: int, expected: int) -> None:
    assert bytes_per_row(format, C) == expected
    assert sum(part.nbytes for part in boundary_format(format).encode(torch.ones(C))) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_a_rounded_boundary_has_no_graph(format: str) -> None:
    assert not round_boundary(hidden(1).requires_grad_(), format).requires_grad


def test_an_unknown_format_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="'fp4'; allowed: float32, bfloat16, fp8"):
        replace(LAYOUT, format="fp4")


def test_segments_are_at_most_64_mib_and_a_64th_of_the_boundary_or_one_batch() -> None:
    for count, width, expected in (7, 131, 1), (640, 131, 10), (641, 131, 11), (10**6, 8192, 170), (3, 1 << 27, 1):
        layout = BoundaryLayout(3, 5, width, 0, count, "fp8")
        assert layout.segment_records == {170: (1 << 26) // layout.record_bytes}.get(expected, expected)
        assert sum(layout.records_of(segment) for segment in range(layout.segments)) == count


def test_the_largest_count_is_the_last_that_fits_while_rolling() -> None:
    for limit in (0, 2000, 5000, 12345, 99991):
        fitting = [n for n in range(1, 99) if replace(LAYOUT, count=n).peak_bytes <= limit]
        assert largest_count(2, 3, 131, "bfloat16", limit) == max(fitting, default=0)
