"""Which mel bin and frame belongs to which token, and what the encoder and the decoder compute from tokens."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from ssl_c2f.curriculum.compress import pool_time
from ssl_c2f.curriculum.geometry import AudioOptions, Compression, Geometry, make_geometry
from ssl_c2f.models.decoder import Decoder
from ssl_c2f.models.heads import Head, HeadKind, Readout, read_out
from ssl_c2f.models.patches import patchify, real_values, sincos_positions, unpatchify
from ssl_c2f.models.vit import ViT, ViTOptions, attention_mask

COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)
AUDIO = AudioOptions(num_mels=16, clip_seconds=0.4)
MODEL = ViTOptions(width=16, depth=2, heads=2)
GEOMETRY = make_geometry(AUDIO, "frame_shift", (8, 4))

geometries = st.builds(
    make_geometry, st.just(AUDIO), st.sampled_from(COMPRESSIONS),
    st.tuples(st.sampled_from([2, 4, 8, 16]), st.integers(1, 5)), st.integers(1, 4), multiple=st.sampled_from([1, 60]),
)


def ramp(g: Geometry, kind: str) -> Tensor:
    """(1, T, 1): each of the phase's frames holds the number of the fine frame, or the mean or last of those, in it."""
    fine = torch.arange(g.num_frames * g.pool * g.hop // 160, dtype=torch.float64)[None, :, None]
    shifted = fine[:, :: g.hop // 160]
    return shifted if g.pool == 1 else pool_time(shifted, torch.tensor([shifted.shape[1]]), g.pool, kind)  # type: ignore[arg-type]


@given(geometries)
def test_ramps_show_which_mel_and_frame_lands_in_which_token(g: Geometry) -> None:
    frames = ramp(g, g.pool_kind).expand(1, -1, 16)
    mels = torch.arange(16.0).expand(1, g.num_frames, -1)
    in_time, in_mels = patchify(frames, g), patchify(mels, g)
    assert in_time.shape == in_mels.shape == (1, g.num_tokens, g.patch_dim)
    step = g.hop // 160 * g.pool  # fine frames from one of the phase's frames to the next
    late = {"none": 0.0, "mean": (g.pool - 1) / 2, "max": g.pool - 1}[g.pool_kind]
    for f in range(g.grid_f):
        for t in range(g.columns):
            token = f * g.columns + t
            values = in_time[0, token].view(g.patch_f, g.patch_t)
            assert values[0].tolist() == [(t * g.patch_t + i) * step + late for i in range(g.patch_t)]
            assert (values == values[0]).all()
            values = in_mels[0, token].view(g.patch_f, g.patch_t)
            assert values[:, 0].tolist() == [f * g.patch_f + i for i in range(g.patch_f)]
            assert (values == values[:, :1]).all()


@given(st.sampled_from(["pool_mean", "patch"]), st.integers(1, 4), st.integers(1, 5))
def test_frames_of_a_token_stand_where_its_position_says(compression: Compression, factor: int, patch_t: int) -> None:
    g = make_geometry(AUDIO, compression, (4, patch_t), factor)
    centres = patchify(ramp(g, g.pool_kind).expand(1, -1, 16), g)[0, : g.columns].mean(-1)
    positions = (g.positions()[1][: g.columns].double() + 0.5) * patch_t - 0.5  # from fine patches to fine frames
    torch.testing.assert_close(centres, positions, rtol=0, atol=1e-4)


@given(geometries)
def test_unpatchify_is_the_inverse(g: Geometry) -> None:
    spec = torch.randn(2, g.num_frames, 16)
    real = g.columns * g.patch_t
    assert torch.equal(unpatchify(patchify(spec, g), g), spec[:, :real])
    patches = torch.randn(2, g.num_tokens, g.patch_dim)
    assert torch.equal(patchify(unpatchify(patches, g), g), patches)


@given(geometries, st.data())
def test_values_of_patches_are_real_where_frames_are(g: Geometry, data: st.DataObject) -> None:
    num_frames = torch.tensor(data.draw(st.lists(st.integers(1, g.frames(g.clip_samples)), min_size=1, max_size=3)))
    frames = torch.arange(g.num_frames).expand(len(num_frames), -1)[..., None].expand(-1, -1, 16)
    expected = patchify(frames, g) < num_frames[:, None, None]
    assert torch.equal(real_values(num_frames, g), expected)
    assert (expected.sum((1, 2)) == num_frames * 16).all()


@given(st.sampled_from(COMPRESSIONS), st.sampled_from([2, 4]))
def test_sine_cosine_positions_are_those_of_the_middle(compression: Compression, factor: int) -> None:
    """Exact in every geometry: a coarse column's code is the fine one's formula at its own place."""
    g = make_geometry(AUDIO, compression, (4, 2), factor)
    rows, columns = (p.double() for p in g.positions())
    omega = 1 / 10000 ** (torch.arange(4, dtype=torch.float64) / 4)  # half of 16 for frequency, half for time
    table = sincos_positions(g, 16).view(g.grid_f, g.columns, 2, 8)

    def code(places: Tensor) -> Tensor:
        angle = places[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1).float()

    torch.testing.assert_close(table[:, :, 0], code(rows)[:, None].expand(-1, g.columns, -1))
    torch.testing.assert_close(table[:, :, 1], code(columns[: g.columns]).expand(g.grid_f, -1, -1))


@settings(max_examples=20)
@given(st.data())
def test_only_kept_tokens_are_encoded(data: st.DataObject) -> None:
    encoder = ViT(MODEL, GEOMETRY).eval()
    tokens = st.sets(st.integers(0, GEOMETRY.num_tokens - 1), min_size=3, max_size=3)
    kept = torch.tensor([sorted(data.draw(tokens))])
    patches = torch.randn(1, GEOMETRY.num_tokens, GEOMETRY.patch_dim)
    hidden = patches.clone()
    hidden[0, [i for i in range(GEOMETRY.num_tokens) if i not in kept[0].tolist()]] = torch.nan
    output = encoder(patches, kept)
    assert output.shape == (1, 4, 16)
    assert torch.equal(encoder(hidden, kept), output)
    # which three is told by what they hold and where they stand: their order does not matter
    torch.testing.assert_close(encoder(patches, kept.flip(1))[:, 1:].flip(1), output[:, 1:])
    assert not torch.allclose(encoder(patches, (kept + 1) % GEOMETRY.num_tokens), output)


@pytest.mark.parametrize("fused", [True, False])
def test_nobody_attends_to_padding(fused: bool) -> None:
    """With either of timm's two kinds of attention."""
    encoder = ViT(MODEL, GEOMETRY).eval()
    for module in encoder.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", fused)  # noqa: B010
    patches = torch.randn(2, GEOMETRY.num_tokens, GEOMETRY.patch_dim)
    real = GEOMETRY.num_tokens - 5
    valid = torch.arange(GEOMETRY.num_tokens).expand(2, -1) < real
    output = encoder(patches, valid=valid)
    patches[:, real:] = 1e3
    assert torch.equal(encoder(patches, valid=valid)[:, : 1 + real], output[:, : 1 + real])
    kept = torch.arange(real).expand(2, -1)
    torch.testing.assert_close(encoder(patches, kept), output[:, : 1 + real], rtol=1e-4, atol=1e-5)


def test_the_class_token_is_never_padding() -> None:
    mask = attention_mask(torch.tensor([[True, False]]))
    assert mask is not None and mask.tolist() == [[[[0.0, 0.0, -torch.inf]]]]
    assert attention_mask(None) is None


def test_drop_path_rises_linearly() -> None:
    encoder = ViT(ViTOptions(width=16, depth=4, heads=2, drop_path=0.3), GEOMETRY)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("wrong", [{"width": 30}, {"width": 32, "heads": 5}, {"width": 6, "heads": 1}, {"depth": 0}])
def test_impossible_encoders_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ViTOptions(**wrong)


def test_layers_begin_as_in_mae() -> None:
    encoder = ViT(ViTOptions(width=64, depth=1, heads=2, positions="learned"), GEOMETRY)
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
    weight = encoder.patch_embed.weight
    bound = (6 / sum(weight.shape)) ** 0.5  # Xavier's uniform
    assert 0.95 * bound < weight.abs().max() <= bound
    assert all(isinstance(m.eps, float) and m.eps == 1e-6 for m in encoder.modules() if isinstance(m, nn.LayerNorm))
    assert isinstance(encoder.positions, nn.Parameter) and len(encoder.positions) == GEOMETRY.num_tokens
    assert "positions" not in ViT(MODEL, GEOMETRY).state_dict()  # sine-cosine ones are made anew


def test_the_decoder_puts_each_token_in_its_place() -> None:
    """Without blocks there is no mixing: a token's prediction is that of what stands there."""
    decoder = Decoder(MODEL, 8, 0, 2, GEOMETRY).eval()
    decoder.positions.zero_()
    tokens, kept = torch.randn(1, 4, 16), torch.tensor([[1, 5, 6]])
    predicted = decoder(tokens, kept)
    assert predicted.shape == (1, GEOMETRY.num_tokens, GEOMETRY.patch_dim)
    at = decoder.to_patch(decoder.norm(decoder.embed(tokens[:, 1:])))
    torch.testing.assert_close(predicted[:, [1, 5, 6]], at)
    gaps = [i for i in range(GEOMETRY.num_tokens) if i not in (1, 5, 6)]
    gap = decoder.to_patch(decoder.norm(decoder.mask_token))
    torch.testing.assert_close(predicted[:, gaps], gap.expand(1, len(gaps), -1))


@given(st.sampled_from(get_args(Readout)), st.integers(1, 6))
def test_padding_has_no_share_in_a_readout(kind: Readout, real: int) -> None:
    """Tokens of three rows and six columns, of which the first are real."""
    prefix, grid = torch.randn(2, 1, 5), torch.randn(2, 3, 6, 5)
    valid = (torch.arange(6) < real).repeat(2, 3)
    found = read_out(torch.cat([prefix, grid.flatten(1, 2)], 1), valid, kind, 1, (1, 3))
    there = grid[:, :, :real]
    alone = torch.cat([prefix, there.flatten(1, 2)], 1)
    torch.testing.assert_close(found, read_out(alone, None, kind, 1, (1, 3)), rtol=1e-4, atol=1e-5)
    rows, tokens = there.mean(2).flatten(1), there.flatten(1, 2)
    expected = {
        "class_token": prefix[:, 0],
        "mean": tokens.mean(1),
        "mean_std": torch.cat([tokens.mean(1), tokens.std(1, correction=0)], 1),
        "bands": rows,
        "bands_std": torch.cat([rows, there.std(2, correction=0).flatten(1)], 1),
    }[kind]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", get_args(HeadKind))
def test_a_head_starts_without_an_opinion(kind: HeadKind) -> None:
    head = Head(kind, 16, 3, 1)
    logits = head(torch.randn(50, 7, 16), None)
    assert logits.shape == (50, 3) and logits.abs().max() < 1
    own = {name for name, _ in head.named_parameters()}
    assert ("norm.weight" in own) == (kind in ("mean_pool", "bands", "ast"))
