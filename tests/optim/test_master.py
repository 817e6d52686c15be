"""Split master weights: a bfloat16 weight and its 16 low bits must equal the float32 master bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.optim.master_weights import MasterWeight, join_halves, low_bits, round_to_bfloat16
from tests.support.layouts import LAYOUTS, recipe
from tests.support.suites import slow
from tests.support.synthetic import state_after

floats = st.lists(st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(floats)
def test_weight_and_remainder_are_the_master(values):
    master = torch.tensor(values, dtype=torch.float32)
    rounded, remainder = round_to_bfloat16(master), low_bits(master)
    assert remainder.dtype is torch.int16 and rounded.dtype is torch.bfloat16
    assert torch.equal(join_halves(rounded, remainder).view(torch.int32), master.view(torch.int32))


@settings(max_examples=300, deadline=None)
@given(floats)
def test_rounding_is_to_the_nearest(values):
    master = torch.tensor(values, dtype=torch.float32)
    rounded, reference = round_to_bfloat16(master), master.bfloat16()
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(rounded[~tie].view(torch.int16), reference[~tie].view(torch.int16))
    halfway = (rounded.double() - master.double()).abs() == (reference.double() - master.double()).abs()
    assert halfway.all()


@pytest.mark.parametrize("kind", ["float32", "split"])
def test_master_returns_the_values_written(kind):
    weights = torch.zeros(3, 4, dtype=torch.bfloat16)
    master = MasterWeight(weights, kind)
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    copy = master.to_float32()
    copy.copy_(values)
    master.write(copy)
    assert torch.equal(master.to_float32(), values)
    assert torch.equal(weights, round_to_bfloat16(values))
    assert torch.equal(master.rows(1, 3).to_float32(), values[1:3])
    assert master.state_bytes() == values.numel() * (2 if kind == "split" else 4)


@pytest.mark.parametrize(("layout", "steps"), [("EP2xTP2-4", 20), slow("1", 200), slow("EP2xTP2-4", 200)])
def test_split_and_float32_masters_are_bit_identical(pool, layout, steps):
    world_size, parallel = LAYOUTS[layout]
    config = recipe(parallel, dtype="bfloat16")
    histories = {}
    for kind in ("float32", "split"):
        changed = replace(config, optimizer=replace(config.optimizer, master_weights=kind))
        histories[kind] = pool.run(world_size, state_after, changed, steps)
    for plain, split in zip(histories["float32"], histories["split"], strict=True):
        for name in ("weights", "masters", "momenta"):
            assert plain[name] and len(plain[name]) == len(split[name])
            for one, other in zip(plain[name], split[name], strict=True):
                np.testing.assert_array_equal(one[3], other[3], err_msg=one[0])
        assert split["bytes"] < plain["bytes"]
