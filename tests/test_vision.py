from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps

from mmprefix.data.datamodule import ShardDataModule
from mmprefix.data.images import RandomAffine
from mmprefix.errors import InputError
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.processing import MMPrefixProcessor
from mmprefix.vision import (
    ConnectorArgs,
    ImageTransform,
    PixelShuffle,
    VisionArgs,
    VisionEncoder,
    VisionSpec,
    as_levels,
    as_picture,
    build_connector,
    resample,
    resolve_vision,
    tile_grid,
)
from tests.conftest import make_model

SMALL = [
    VisionArgs("test_vit", image_size=32),
    VisionArgs("convnext_atto", image_size=64),
    VisionArgs("resnet10t", image_size=64),
    VisionArgs("swin_tiny_patch4_window7_224", kwargs={"depths": [1, 1, 1, 1]}),
    VisionArgs("vit_base_patch16_siglip_224", kwargs={"depth": 1, "embed_dim": 48, "num_heads": 4}),
    VisionArgs("vit_tiny_patch16_224", image_size=48, kwargs={"depth": 1, "reg_tokens": 3}),
]


@pytest.mark.parametrize("args", SMALL, ids=lambda args: args.name)
def test_what_is_resolved_without_weights_is_what_the_encoder_gives(args):
    spec = resolve_vision(args)
    encoder = VisionEncoder(spec).eval()
    height, width = spec.image_size
    tokens = encoder(torch.randn(2, 3, height, width))
    assert tokens.shape == (2, spec.num_tokens, spec.width)
    assert spec.grid is not None
    assert spec.grid[0] * spec.grid[1] == spec.num_tokens


@pytest.mark.parametrize("args", SMALL, ids=lambda args: args.name)
def test_every_trainable_parameter_gets_a_gradient(args):
    """DistributedDataParallel waits for each; poolers and heads that tokens don't pass through must not be waited for."""
    spec = resolve_vision(args)
    encoder = VisionEncoder(spec)
    encoder(torch.randn(2, 3, *spec.image_size)).square().sum().backward()
    missing = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_heads_are_found_unused():
    spec = resolve_vision(VisionArgs("vit_base_patch16_siglip_224", kwargs={"depth": 1}))
    assert spec.unused
    assert all(name.startswith("attn_pool.") for name in spec.unused)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_specs_are_found_where_no_gradients_are_wanted(mode):
    with mode():
        without = resolve_vision(SMALL[4])
    assert without == resolve_vision(SMALL[4])
    assert without.unused


def test_one_value_for_each_channel_is_enough_to_build():
    """Batch norm wants more in training, which more than one picture, or frozen statistics, give."""
    spec = resolve_vision(VisionArgs("resnet10t", image_size=32))
    assert (spec.grid, spec.num_tokens) == ((1, 1), 1)


def test_encoders_without_one_feature_map_are_refused():
    with pytest.raises(InputError, match="CoaT gives list, expected one feature map"):
        resolve_vision(VisionArgs("coat_tiny"))


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch):
    spec = resolve_vision(SMALL[0])
    create = timm.create_model

    def offline(*args, pretrained, **kwargs):
        if pretrained:
            raise OSError("no such host\nsecond line")
        return create(*args, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match="cannot get the weights of test_vit: no such host second line"):
        VisionEncoder(spec, pretrained=True)


def test_data_config_is_timms_own():
    import timm.data

    for name in ("vit_base_patch16_siglip_224", "convnext_atto", "resnet10t"):
        expected = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        spec = resolve_vision(VisionArgs(name))
        assert spec.mean == tuple(expected["mean"])
        assert spec.std == tuple(expected["std"])
        assert spec.interpolation == expected["interpolation"]
        assert spec.image_size == expected["input_size"][1:]


def test_spec_survives_json():
    import json

    spec = resolve_vision(SMALL[0])
    assert VisionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_local_weights_file_is_loaded(tmp_path):
    spec = resolve_vision(SMALL[0])
    source = VisionEncoder(spec)
    torch.save(source.model.state_dict(), tmp_path / "weights.pth")
    loaded = VisionEncoder(spec, pretrained=str(tmp_path / "weights.pth"))
    for name, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 7}, "expected weights of test_vit, 12 tensors are missing: blocks.6."),
        ({"embed_dim": 96, "num_heads": 2}, "expected weights of test_vit: .*size mismatch"),
    ],
)
def test_weights_that_do_not_fit_are_refused(kwargs, message, tmp_path):
    torch.save(VisionEncoder(resolve_vision(SMALL[0])).model.state_dict(), tmp_path / "weights.pth")
    other = resolve_vision(VisionArgs("test_vit", image_size=32, kwargs=kwargs))
    with pytest.raises(InputError, match=message):
        VisionEncoder(other, pretrained=str(tmp_path / "weights.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match="expected weights of test_vit"):
        VisionEncoder(other, pretrained=str(tmp_path / "text.pth"))


def test_pixel_shuffle_matches_a_loop_over_blocks():
    rows, columns, width, f = 4, 6, 5, 2
    tokens = torch.randn(2, rows * columns, width)
    grid = tokens.view(2, rows, columns, width)
    slow = torch.stack([
        torch.cat([grid[:, r + i, c + j] for i in range(f) for j in range(f)], dim=-1)
        for r in range(0, rows, f) for c in range(0, columns, f)
    ], dim=1)  # fmt: skip
    assert torch.equal(PixelShuffle((rows, columns), f)(tokens), slow)


@pytest.mark.parametrize(("kind", "num_tokens"), [("linear", 4), ("mlp", 4), ("pixel_shuffle", 1)])
def test_connectors_give_the_tokens_they_promise(kind, num_tokens):
    spec = resolve_vision(SMALL[0])
    connector, promised = build_connector(ConnectorArgs(kind, factor=2), spec, decoder_width=24)
    assert promised == num_tokens
    assert connector(torch.randn(3, spec.num_tokens, spec.width)).shape == (3, num_tokens, 24)


def test_transform_squashes_and_normalises(photos):
    transform = ImageTransform((32, 48), (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), "bilinear")
    pixels = transform(photos[0])
    resized = transform.resize(photos[0]).permute(1, 2, 0).numpy() / 255
    expected = (resized - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.25, 0.5])
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert transform(photos[2].convert("L")).shape == (3, 32, 48)


@pytest.mark.parametrize(
    "picture", [torch.rand(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)]
)
def test_other_tensors_than_levels_are_refused(picture):
    transform = ImageTransform((4, 4), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match=r"expected a picture or uint8 \[3, H, W\], got torch\.\w+ \["):
        transform(picture)


def passes(levels, size, method):
    """Pillow's resize, along rows first, as all its versions before 13 do it."""
    picture = as_picture(levels).resize((size[1], levels.shape[1]), method)
    return as_levels(picture.resize((size[1], size[0]), method))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_resampling_matches_pillow_within_a_level(interpolation, photos):
    """Portraits and landscapes, lines, enlarged and reduced; noise of black and white, where rounding adds up most."""
    rng, method = np.random.default_rng(0), Image.Resampling[interpolation.upper()]
    sizes = [(300, 400), (400, 300), (31, 20), (20, 31), (640, 13), (2, 3000), (3000, 2), (1, 1), (5, 224)]
    pictures = [torch.from_numpy(rng.choice([0, 255], (*size, 3)).astype(np.uint8)).permute(2, 0, 1) for size in sizes]
    pictures += [torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).permute(2, 0, 1) for size in sizes]
    pictures += [as_levels(photo) for photo in photos]
    pictures += [as_levels(photo).contiguous() for photo in photos]
    differences = []
    for levels in pictures:
        for size in ((224, 224), (16, 500), (97, 31)):
            seen = resample(levels, size, interpolation)
            assert (seen.dtype, seen.shape) == (torch.uint8, (3, *size))
            differences.append((seen.int() - passes(levels, size, method).int()).abs().flatten())
    apart = torch.cat(differences)
    assert apart.max() <= 2
    assert (apart > 1).float().mean() < 5e-5
    assert interpolation in ("bicubic", "bilinear") or apart.max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_give_the_tokens_of_normalised_pixels(dtype, photos):
    """Whether pixels are normalised before the encoder or in it; also with other values for each channel."""
    spec = replace(resolve_vision(SMALL[0]), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    transform, encoder = ImageTransform.from_spec(spec), VisionEncoder(spec).eval().to(dtype)
    levels = torch.stack([transform.resize(photo) for photo in photos])
    expected = (levels.double() / 255 - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)
    pixels = torch.stack([transform(photo) for photo in photos])
    torch.testing.assert_close(pixels.double(), expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        assert torch.equal(encoder(levels), encoder(pixels))


@pytest.mark.parametrize("size", [(40, 40), (33, 57), (80, 20), (7, 300)])
def test_padded_and_cut_pictures_match_pillow(size):
    """Where nothing is interpolated the pixels are the same; elsewhere they stand in the same place."""
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    for mode, make in (("pad", partial(ImageOps.pad, color=(128, 64, 191))), ("crop", ImageOps.fit)):
        for method in ("nearest", "bilinear"):
            transform = ImageTransform((40, 48), (0.5, 0.25, 0.75), (1, 1, 1), method, mode)
            expected = as_levels(make(picture, (48, 40), Image.Resampling[method.upper()]))
            apart = (transform.resize(picture).int() - expected.int()).abs().max()
            assert apart <= (method == "bilinear" and mode == "pad")


def test_resize_modes_keep_all_the_middle_or_the_aspect_ratio():
    """A picture of three vertical stripes, twice as wide as high."""
    stripes = Image.new("RGB", (80, 40), (255, 0, 0))
    stripes.paste((0, 255, 0), (20, 0, 60, 40))
    stripes.paste((0, 0, 255), (60, 0, 80, 40))
    seen = {
        mode: np.asarray(
            as_picture(ImageTransform((20, 20), (0.5, 0.25, 0.75), (1, 1, 1), "nearest", mode).resize(stripes))
        )
        for mode in ("squash", "crop", "pad")
    }
    assert [picture.shape for picture in seen.values()] == [(20, 20, 3)] * 3
    assert [tuple(seen["squash"][10, x]) for x in (0, 10, 19)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert np.unique(seen["crop"].reshape(-1, 3), axis=0).tolist() == [[0, 255, 0]], "the middle half"
    assert [tuple(seen["pad"][10, x]) for x in (0, 10, 19)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert {tuple(row) for row in seen["pad"][[0, 4, 15, 19]].reshape(-1, 3).tolist()} == {(128, 64, 191)}


@pytest.mark.parametrize("mode", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_pictures_of_any_shape_come_to_the_size(mode, size):
    transform = ImageTransform((20, 32), (0, 0, 0), (1, 1, 1), resize_mode=mode)
    assert transform.resize(Image.new("RGB", size)).shape == (3, 20, 32)


@pytest.mark.parametrize("mode", ["squash", "crop", "pad"])
def test_the_resize_mode_is_part_of_the_model(tmp_path, mode, photos):
    model, processor = make_model(vision=VisionArgs("test_vit", image_size=32, resize=mode))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    spec = MMPrefixForConditionalGeneration.from_pretrained(tmp_path).config.vision_spec
    loaded = MMPrefixProcessor.from_pretrained(tmp_path)
    assert spec.resize == loaded.transform.resize_mode == mode
    assert torch.equal(loaded.transform(photos[0]), ImageTransform.from_spec(spec)(photos[0]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (VisionArgs("vit_tiny_patch16_224", image_size=100), "takes multiples of its patch size 16, got 100x100; the nearest are 96 and 112"),
        (VisionArgs("vit_tiny_patch16_224", image_size=320, pretrained=True), "has pretrained position embeddings for 224x224, got 320x320; interpolate them with"),
        (VisionArgs("vit_tiny_patch16_224", pretrained=True, kwargs={"img_size": 112}), "for 224x224, got 112x112"),
    ],
)  # fmt: skip
def test_sizes_that_the_encoder_cannot_take(args, message):
    with pytest.raises(InputError, match=message):
        resolve_vision(args)


def test_position_embeddings_are_interpolated_on_request(tmp_path):
    import timm

    small = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    args = VisionArgs(
        "vit_tiny_patch16_224", str(tmp_path / "weights.pth"), image_size=112,
        interpolate_position_embeddings=True, kwargs={"depth": 1},
    )  # fmt: skip
    spec = resolve_vision(args)
    assert spec.num_tokens == 49
    with pytest.raises(
        InputError, match=r"has position embeddings \(1, 197, 192\), .* at 112x112 needs \(1, 50, 192\)"
    ):
        VisionEncoder(spec, args.pretrained)
    encoder = VisionEncoder(spec, args.pretrained, args.interpolate_position_embeddings)
    grid = small.pos_embed[:, 1:].unflatten(1, (14, 14))
    averaged = grid.unflatten(1, (7, 2)).unflatten(3, (7, 2)).mean((2, 4))
    found = encoder.model.pos_embed[:, 1:].unflatten(1, (7, 7))
    correlation = torch.corrcoef(torch.stack([found.flatten(), averaged.flatten()]))[0, 1]
    assert correlation > 0.9, "interpolated, not started anew"
    assert torch.equal(encoder.model.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)


# Tiles


@pytest.mark.parametrize(
    ("size", "max_tiles", "expected"),
    [
        ((100, 80), 6, (1, 1)),  # shown whole by one
        ((101, 80), 6, (1, 2)),
        ((300, 100), 6, (1, 3)),
        ((100, 300), 6, (3, 1)),
        ((2000, 2000), 6, (2, 2)),
        ((2000, 1400), 6, (2, 3)),
        ((2000, 10), 6, (1, 6)),
        ((2000, 1400), 1, (1, 1)),
        ((1, 1), 12, (1, 1)),
    ],
)
def test_the_grid_shows_most_pixels_with_fewest_tiles(size, max_tiles, expected):
    assert tile_grid(size, (100, 100), max_tiles) == expected


def test_tiles_are_the_image_in_its_own_aspect_ratio():
    """A picture of exactly 3 x 2 tiles: nothing is resized, and the tiles are its parts, row by row."""
    transform = ImageTransform((20, 30), (0.5, 0.25, 0.75), (0.5, 0.5, 0.5), resize_mode="tiles", max_tiles=6)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    views = transform.views(Image.fromarray(pixels))
    assert views.shape == (7, 3, 20, 30)
    parts = [pixels[r : r + 20, c : c + 30] for r in (0, 20) for c in (0, 30, 60)]
    for view, part in zip(views[1:], parts, strict=True):
        assert torch.equal(view, torch.from_numpy(part).permute(2, 0, 1))
    padded = replace(transform, resize_mode="pad")
    assert torch.equal(views[0], padded.resize(Image.fromarray(pixels))), "the whole comes first"
    small = Image.fromarray(pixels[:10, :10])
    assert torch.equal(transform.views(small), padded.views(small)), "one tile would show it as well"
    tall = transform.views(Image.fromarray(pixels[:, :5]))  # 40 x 5: two rows, the sides filled up
    assert tall.shape[0] == 3
    assert tall[1, :, 0, 0].tolist() == [128, 64, 191]


def test_a_model_answers_from_tiles_and_refuses_what_cannot_have_them(photos, tmp_path):
    vision = VisionArgs("test_vit", image_size=32, resize="tiles", max_tiles=4)
    model, processor = make_model(vision=vision)
    assert model.config.vision_spec.max_views == 5
    large, long = photos[0], photos[2].crop((0, 0, 90, 30))
    inputs = processor([large, long], ["what is this?", "and this?"])
    views = [len(processor.transform.views(photo)) for photo in (large, long)]
    assert views == [5, 4], "2 x 2, and 1 x 3 of the long one"
    assert inputs["pixel_values"].shape[0] == 9
    placeholders = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    assert placeholders.tolist() == [number * model.num_image_tokens for number in views]
    together = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for n, (photo, text) in enumerate(((large, "what is this?"), (long, "and this?"))):
        alone = processor(photo, text)
        answer = model.generate(**alone, max_new_tokens=4, do_sample=False)[:, alone["input_ids"].shape[1] :]
        assert processor.decode_generated(answer) == processor.decode_generated(together[n : n + 1])
    processor.save_pretrained(tmp_path)
    again = MMPrefixProcessor.from_pretrained(tmp_path)
    assert again.transform == processor.transform
    with pytest.raises(InputError, match="model.vision.max_tiles: expected at least 1, got 0"):
        resolve_vision(replace(vision, max_tiles=0))
    for setting, value in (("augmentation", RandomAffine(degrees=3)), ("max_tokens", 100)):
        data = ShardDataModule(processor, train="unread", **{setting: value})
        with pytest.raises(InputError, match=rf"data.{setting}: expected .*squash, crop or pad, got tiles"):
            data.train_dataloader()
