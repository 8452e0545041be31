"""Compensator files of both layouts, what they refuse, and the unfused change."""

from __future__ import annotations

import io
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from tocom.compensator import Compensator, CompensatorInfo
from tocom.dropout import DropoutKey
from tocom.runtime.errors import InputError


def pth(compensator) -> bytes:
    stream = io.BytesIO()
    torch.save(compensator.to_original(), stream)
    return stream.getvalue()


def refused(file, content: bytes) -> str:
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        Compensator.load(file)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_safetensors_round_trip_keeps_weights_and_origin(tmp_path, make_compensator):
    origin = {"rank": 3, "groups": 16, "backbone": "deit_tiny_patch16_224", "training_scale": 0.12,
              "backbone_sha256": "c" * 64}  # fmt: skip
    written = make_compensator(24, 3, **origin)
    (tmp_path / "c.safetensors").write_bytes(written.to_safetensors())
    read = Compensator.load(tmp_path / "c.safetensors")
    assert read.info == written.info == CompensatorInfo(24, 3, schedule="constant", **origin)
    assert not read.training
    assert written.state_dict().keys() == read.state_dict().keys()
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in written.state_dict().items())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_original_layout_round_trips_and_tells_its_sizes(tmp_path, make_compensator, rank):
    written = make_compensator(24, 3, rank=rank)
    (tmp_path / "c.pth").write_bytes(pth(written))
    stored = torch.load(tmp_path / "c.pth", weights_only=True)["model"]
    assert stored.keys() == {
        f"blocks.{block}.attn.{which}_tocom.adapter_{side}.weight"
        for block in range(3)
        for which in "qv"
        for side in ("down", "up")
    }
    assert stored["blocks.2.attn.v_tocom.adapter_down.weight"].shape == (16 * rank, 24)
    assert stored["blocks.2.attn.v_tocom.adapter_up.weight"].shape == (24, 16 * rank)
    read = Compensator.load(tmp_path / "c.pth")
    assert read.info == CompensatorInfo(24, 3, rank=rank)
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in written.state_dict().items())


def test_a_whole_network_with_its_compensator_gives_the_compensator(tmp_path, make_compensator):
    """The original release saves the backbone beside the pairs."""
    written = make_compensator(24, 2)
    model = {"cls_token": torch.zeros(1, 1, 24), **written.state_dict(), "head.weight": torch.zeros(3, 24)}
    torch.save({"model": model}, tmp_path / "c.pth")
    assert Compensator.load(tmp_path / "c.pth").state_dict().keys() == written.state_dict().keys()


def test_a_file_without_pairs_is_refused(tmp_path):
    message = refused(tmp_path / "c.safetensors", save({"head.weight": torch.zeros(3, 4)}))
    assert "blocks.0.attn.q_tocom.adapter_down.weight, found none of 1" in message


@pytest.mark.parametrize("layout", ["safetensors", "pth"])
def test_wrong_names_and_shapes_are_refused(tmp_path, make_compensator, layout):
    written = make_compensator(24, 3)
    weights = dict(written.state_dict())
    metadata = {"format": "tocom-compensator-1", "info": json.dumps({"width": 24, "depth": 3})}

    def content(tensors):
        if layout == "safetensors":
            return save(tensors, metadata)
        stream = io.BytesIO()
        torch.save({"model": tensors}, stream)
        return stream.getvalue()

    key, file = "blocks.1.attn.v_tocom.adapter_up.weight", tmp_path / f"c.{layout}"
    missing = {name: tensor for name, tensor in weights.items() if name != key}
    wrong = {
        "of 3 blocks must hold exactly q and v pairs, 'blocks.": [
            missing,
            {**missing, key.replace("v_tocom", "k_tocom"): weights[key]},
            {**weights, key.replace("weight", "bias"): torch.zeros(24)},
            {name.replace("blocks.2", "blocks.7"): tensor for name, tensor in weights.items()},
        ],
        f"{key} must have shape (24, 32)": [
            {**weights, key: torch.zeros(24, 16)},
            {**weights, key: torch.zeros(32, 24)},
            {**weights, key: torch.zeros(24)},
            {**weights, key: torch.zeros(24, 32, dtype=torch.int64)},
        ],
    }
    for message, contents in wrong.items():
        for tensors in contents:
            assert message in refused(file, content(tensors))
    file.write_bytes(content(weights))
    Compensator.load(file)


@pytest.mark.parametrize("shape", [(24, 24), (17, 24), (0, 24), (16,), (32, 0)])
def test_the_first_pair_of_the_original_layout_must_have_16_groups(tmp_path, shape):
    stream = io.BytesIO()
    torch.save({"model": {"blocks.0.attn.q_tocom.adapter_down.weight": torch.zeros(shape)}}, stream)
    assert "must be [16*k, C]" in refused(tmp_path / "c.pth", stream.getvalue())


@pytest.mark.parametrize(
    "info",
    [
        "", "{", "[]", "7", "null", '"width"', "{}", '{"width": 24}', "[" * 5000,
        '{"width": "24", "depth": 3}', '{"width": 24.0, "depth": 3}', '{"width": true, "depth": 3}',
        '{"width": 0, "depth": 3}', '{"width": -24, "depth": 3}', '{"width": 24, "depth": 3, "colour": 1}',
        '{"width": 24, "depth": 3, "rank": 0}', '{"width": 24, "depth": 3, "groups": null}',
        '{"width": 24, "depth": 3, "training_scale": NaN}', '{"width": 24, "depth": 3, "training_scale": Infinity}',
        '{"width": 24, "depth": 3, "training_scale": 1' + "0" * 400 + "}",
        '{"width": 24, "depth": 3, "training_scale": "0.1"}', '{"width": 24, "depth": 3, "backbone": ["x"]}',
        '{"width": 24, "depth": 100000000}',
    ],
)  # fmt: skip
def test_broken_metadata_is_refused(tmp_path, make_compensator, info):
    weights = make_compensator(24, 3).state_dict()
    content = save(dict(weights), {"format": "tocom-compensator-1", "info": info})
    assert "metadata does not describe one" in refused(tmp_path / "c.safetensors", content)


@pytest.mark.parametrize(
    "change", [{"groups": 8}, {"groups": 65535, "rank": 65535}, {"width": 65535}, {"depth": 65535}]
)
def test_metadata_that_does_not_fit_the_weights_is_refused_before_memory_is_taken(tmp_path, make_compensator, change):
    info = json.dumps({"width": 24, "depth": 3} | change)
    weights = make_compensator(24, 3).state_dict()
    refused(tmp_path / "c.safetensors", save(dict(weights), {"format": "tocom-compensator-1", "info": info}))


def test_a_later_format_is_refused(tmp_path, make_compensator):
    written = make_compensator(24, 3)
    metadata = {"format": "tocom-compensator-2", "info": json.dumps({"width": 24, "depth": 3})}
    assert "tocom-compensator-2" in refused(tmp_path / "c.safetensors", save(dict(written.state_dict()), metadata))


def test_groups_and_rank_may_trade_places_in_metadata_only(tmp_path, make_compensator):
    """[8 groups of rank 4] has the shapes of [16 of rank 2]: only metadata can tell, and the largest degree follows."""
    compensator = make_compensator(24, 2, groups=8, rank=4)
    (tmp_path / "c.safetensors").write_bytes(compensator.to_safetensors())
    read = Compensator.load(tmp_path / "c.safetensors")
    read.between(0, 8)
    with pytest.raises(InputError, match=r"target degree must lie in 0\.\.8"):
        read.between(0, 9)


@pytest.mark.parametrize(
    ("source", "target", "named"), [(0, 17, "target"), (17, 0, "source"), (-1, 4, "source"), (4, -1, "target")]
)
def test_degrees_beyond_the_trained_ones_are_refused(make_compensator, source, target, named):
    with pytest.raises(InputError, match=rf"the {named} degree must lie in 0\.\.16"):
        make_compensator(24, 2).between(source, target)


def test_another_backbone_is_refused(make_compensator):
    compensator = make_compensator(24, 2, backbone="deit_tiny_patch16_224")
    compensator.require_fits(backbone="deit_tiny_patch16_224", width=24, depth=2)
    make_compensator(24, 2).require_fits(backbone="anything", width=24, depth=2)  # the original layout cannot tell
    for other, named in [
        ({"backbone": "vit_tiny_patch16_224"}, "for backbone deit_tiny_patch16_224, but the model is vit_tiny"),
        ({"width": 48}, "for width 24 and 2 blocks"),
        ({"depth": 12}, "for width 24 and 2 blocks"),
    ]:
        with pytest.raises(InputError, match=named):
            compensator.require_fits(**{"backbone": "deit_tiny_patch16_224", "width": 24, "depth": 2} | other)


def test_a_new_compensator_changes_nothing():
    compensator = Compensator(CompensatorInfo(width=24, depth=1))
    x = torch.randn(2, 5, 24)
    assert torch.equal(compensator.between(0, 16)(0, x), torch.zeros(2, 5, 72))
    assert compensator.between(0, 16).delta_scale == 0.1


@torch.no_grad()
def test_the_unfused_change_is_the_pairs_one_after_the_other(make_compensator):
    compensator = make_compensator(24, 2).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = compensator.between(2, 5, 0.15)(1, x)
    assert torch.equal(change[..., 24:48], torch.zeros(2, 5, 24, dtype=torch.float64))  # keys
    for which, columns in (("q", slice(0, 24)), ("v", slice(48, 72))):
        pair = compensator.blocks[1]["attn"][f"{which}_tocom"]
        # from degree 2 to degree 5: groups 11, 12, 13 come on, which are ranks 22..27
        hidden = x @ pair.adapter_down.weight[22:28].T
        expected = 0.15 * hidden @ pair.adapter_up.weight[:, 22:28].T
        torch.testing.assert_close(change[..., columns], expected, rtol=1e-12, atol=1e-14)


@torch.no_grad()
def test_dropout_is_on_while_training_with_a_key_only(make_compensator):
    compensator, x = make_compensator(24, 1), torch.randn(4, 50, 24, generator=torch.Generator().manual_seed(0))
    key = DropoutKey(seed=0, step=1)
    plain, keyed = compensator.between(0, 16), compensator.between(0, 16, dropout=key)
    untouched = plain(0, x)
    assert torch.equal(keyed(0, x), untouched)
    compensator.train()
    assert torch.equal(plain(0, x), untouched)
    dropped = keyed(0, x)
    assert torch.equal(dropped, keyed(0, x)) and not torch.equal(dropped, untouched)
    for which, columns in (("q", slice(0, 24)), ("v", slice(48, 72))):
        pair = compensator.blocks[0]["attn"][f"{which}_tocom"]
        hidden = x @ pair.adapter_down.weight.T
        expected = 0.1 * (hidden * key.mask(hidden, 0, which)) @ pair.adapter_up.weight.T
        torch.testing.assert_close(dropped[..., columns], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["safetensors", "pth"])
@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_file_with_changed_bytes_is_refused_or_a_compensator(tmp_path, make_compensator, layout, changes):
    compensator = make_compensator(3, 1, rank=1, backbone="vit")
    content = bytearray(compensator.to_safetensors() if layout == "safetensors" else pth(compensator))
    for where, value in changes:
        content[where % len(content)] = value
    file = tmp_path / f"c.{layout}"
    file.write_bytes(content)
    try:
        read = Compensator.load(file)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert read.between(0, 1).delta(0, "q").isfinite().all()
        assert load(read.to_safetensors()).keys() == read.state_dict().keys()
