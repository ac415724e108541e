import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.diffusion.layers import Attention, Downsample, Dropout, ResBlock, TimeEmbedding
from pipeline.diffusion.unet import UNet, num_parameters
from pipeline.errors import UserError

CIFAR10 = {"image_size": 32}
LSUN = {"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4)}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(seed: int = 0, **settings: object) -> UNet:
    options: dict[str, object] = {"image_size": 16, "base_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
    options |= {"attention_resolutions": (8,), "generator": seeded(seed)} | settings
    return UNet(**options)  # type: ignore[arg-type]


def batch(size: int = 16, channels: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(2, channels, size, size, generator=seeded(1)), torch.tensor([0, 999])


@torch.no_grad()
def shake(model: nn.Module, seed: int = 2) -> None:
    """Random weights of a useful size everywhere, also where the initialiser leaves almost nothing."""
    generator = seeded(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize(
    ("settings", "parameters", "blocks", "attentions", "norms"),
    [(CIFAR10, 35_746_307, 22, 6, 51), (LSUN, 113_673_219, 32, 6, 71)],
    ids=["cifar10", "lsun"],
)
def test_the_network_has_the_paper_s_number_of_parameters_and_layers(
    settings: dict[str, object], parameters: int, blocks: int, attentions: int, norms: int
) -> None:
    with torch.device("meta"):
        model = UNet(**settings)  # type: ignore[arg-type]
    assert num_parameters(model) == parameters
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(ResBlock) == blocks
    assert kinds.count(Attention) == attentions
    assert kinds.count(nn.GroupNorm) == norms
    assert {(m.num_groups, m.eps) for m in model.modules() if isinstance(m, nn.GroupNorm)} == {(32, 1e-6)}
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_prediction_has_the_shape_of_the_images(size: int, channels: int) -> None:
    model = small(image_size=size, in_channels=channels, attention_resolutions=(size // 2,))
    x, t = batch(size, channels)
    assert model(x, t).shape == x.shape


def test_the_fresh_network_predicts_almost_no_noise() -> None:
    eps_hat = small().eval()(*batch()).detach()
    assert 0 < float(eps_hat.abs().max()) < 1e-3


def test_initial_weights_are_uniform_in_the_fan_avg_limits_and_biases_zero() -> None:
    model = small(base_channels=64)
    res = model.down[1].blocks[0].res
    attention = model.down[1].blocks[0].attention
    limits = {
        model.conv_in.weight: math.sqrt(6 / (9 * 3 + 9 * 64)),
        res.conv1.weight: math.sqrt(6 / (9 * 64 + 9 * 128)),
        res.conv2.weight: math.sqrt(6e-10 / (9 * 128 + 9 * 128)),
        res.time_proj.weight: math.sqrt(6 / (256 + 128)),
        res.shortcut.weight: math.sqrt(6 / (64 + 128)),
        attention.proj_out.weight: math.sqrt(6e-10 / (128 + 128)),
        model.conv_out.weight: math.sqrt(6e-10 / (9 * 64 + 9 * 3)),
        model.time_embedding.dense1.weight: math.sqrt(6 / (64 + 256)),
    }
    for part in attention.qkv.weight.chunk(3):  # q, k and v are initialised as layers of their own
        limits[part] = math.sqrt(6 / (128 + 128))
    for weight, limit in limits.items():
        weight = weight.detach()
        assert 0.98 * limit < float(weight.abs().max()) <= limit * (1 + 1e-6)
        assert float(weight.std()) == pytest.approx(limit / math.sqrt(3), rel=0.05)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            assert not module.bias.any()
        if isinstance(module, nn.GroupNorm):
            assert bool((module.weight == 1).all())


def test_every_residual_branch_starts_nearly_at_zero() -> None:
    model = small()
    for module in model.modules():
        if isinstance(module, ResBlock):
            assert 0 < float(module.conv2.weight.detach().abs().max()) < 1e-5
        if isinstance(module, Attention):
            assert 0 < float(module.proj_out.weight.detach().abs().max()) < 1e-5


def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    a, b, other = small(seed=3), small(seed=3), small(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.conv_in.weight, other.conv_in.weight)


def test_classes_add_one_table_and_leave_all_other_weights_of_a_seed_as_they_were() -> None:
    plain, told = small(seed=3).state_dict(), small(seed=3, num_classes=5).state_dict()
    assert [name for name in told if name not in plain] == ["time_embedding.classes.weight"]
    assert all(torch.equal(told[name], tensor) for name, tensor in plain.items())
    table = told["time_embedding.classes.weight"]
    assert table.shape == (6, 128)
    assert float(table.abs().max()) <= math.sqrt(6 / (6 + 128)) < float(table.abs().max()) * 1.02
    assert torch.equal(table, small(seed=3, num_classes=5).time_embedding.classes.weight)


def test_each_class_has_its_own_prediction_and_no_labels_mean_the_last_row() -> None:
    model = small(num_classes=5).eval()
    shake(model)
    x, t = batch()
    predicted = [model(x, t, torch.full((2,), label)) for label in range(6)]
    for label, other in enumerate(predicted[:5]):
        assert not any(torch.allclose(other, later, atol=1e-3) for later in predicted[label + 1 :])
    assert torch.equal(model(x, t), predicted[5])
    torch.testing.assert_close(model(x, t, torch.tensor([0, 3]))[1], predicted[3][1], rtol=1e-4, atol=1e-5)


def test_the_class_is_added_to_the_time_embedding_before_its_last_swish() -> None:
    embedding = TimeEmbedding(8, num_classes=2)
    nn.init.normal_(embedding.classes.weight, generator=seeded(3))
    before: list[Tensor] = []
    embedding.dense2.register_forward_hook(lambda module, inputs, output: before.append(output))
    got = embedding(torch.tensor([7]), torch.float32, torch.tensor([1]))
    torch.testing.assert_close(got, nn.functional.silu(before[0] + embedding.classes.weight[1]))


def test_labels_are_a_programming_error_where_there_are_no_classes() -> None:
    x, t = batch()
    with pytest.raises(AssertionError, match="without classes"):
        small()(x, t, torch.zeros_like(t))


def test_a_class_conditional_network_is_one_graph_to_torch_compile_with_and_without_labels() -> None:
    model = small(num_classes=5).eval()
    shake(model)
    x, t = batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, t), model(x, t))
    assert torch.equal(compiled(x, t, torch.tensor([0, 3])), model(x, t, torch.tensor([0, 3])))


def test_gradients_reach_every_parameter_of_a_class_conditional_network_also_without_labels() -> None:
    model = small(num_classes=5)
    shake(model)
    x, t = batch()
    (model(x, t) - x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.time_embedding.classes.weight.grad.abs().sum(dim=1).bool().tolist() == [False] * 5 + [True]


def test_resetting_draws_the_weights_that_building_drew() -> None:
    model, rebuilt = small(seed=5), small(seed=6)
    shake(rebuilt)
    rebuilt.reset_parameters(seeded(5))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), rebuilt.parameters(), strict=True))


def test_gradients_reach_every_parameter() -> None:
    model = small()
    shake(model)
    x, t = batch()
    (model(x, t) - x).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_gradients_reach_every_residual_end_of_the_fresh_network() -> None:
    model = small().eval()
    x, t = batch()
    (model(x, t) - x).square().mean().backward()
    ends = [m.conv2.weight for m in model.modules() if isinstance(m, ResBlock)]
    ends += [m.proj_out.weight for m in model.modules() if isinstance(m, Attention)]
    assert all(bool(weight.grad.any()) for weight in ends)


def test_channels_last_changes_the_layout_and_not_the_prediction() -> None:
    model = small().eval()
    shake(model)
    x, t = batch()
    plain = model(x, t)
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-4)


def test_the_network_is_one_graph_to_torch_compile() -> None:
    model = small().eval()
    shake(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch()), model(*batch()), rtol=0, atol=0)


def test_bfloat16_autocast_stays_close_to_float32() -> None:
    model = small().eval()
    shake(model)
    x, t = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x, t)
    full = model(x, t)
    assert half.dtype == torch.bfloat16
    assert float((half - full).detach().std() / full.detach().std()) < 0.05


def test_images_of_a_batch_do_not_see_each_other_and_each_has_its_t() -> None:
    model = small().eval()
    shake(model)
    x, t = batch()
    torch.testing.assert_close(model(x, t)[1:], model(x[1:], t[1:]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x, t.flip(0)), model(x, t), atol=1e-3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_as_often_as_asked_and_keeps_the_mean(
    memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.ones(7, 33, 17, 29, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    y = Dropout(0.1)(x)
    y.sum().backward()
    dropped = y == 0
    # 113,883 draws: the standard deviation of the part is 9e-4.
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=4e-3)
    assert y.unique().tolist() == pytest.approx([0.0, torch.tensor(1 / 0.9, dtype=dtype).item()], rel=1e-5)
    assert x.grad is not None
    assert torch.equal(x.grad, y)
    assert y.stride() == x.stride()
    # Neighbours come from one draw and are independent all the same.
    flat = dropped.permute(0, 2, 3, 1).flatten() if memory_format == torch.channels_last else dropped.flatten()
    for distance in (1, 2, 3, 4):
        both = (flat[distance:] & flat[:-distance]).double().mean().item()
        assert both == pytest.approx(0.01, abs=1.5e-3)


def test_dropout_is_a_function_of_the_seed() -> None:
    x = torch.ones(2, 3, 5, 7)
    torch.manual_seed(1)
    first, second = Dropout(0.5)(x), Dropout(0.5)(x)
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.5)(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(Dropout(0.0)(x), x)
    assert bool((Dropout(0.9999999)(x) >= 0).all())


def test_dropout_acts_in_training_only() -> None:
    model = small(dropout=0.5)
    shake(model)
    x, t = batch()
    assert not torch.equal(model.train()(x, t), model(x, t))
    assert torch.equal(model.eval()(x, t), model(x, t))


def test_the_time_embedding_puts_sines_first_and_reaches_a_period_of_two_pi_times_ten_thousand() -> None:
    embedding = TimeEmbedding(8)
    seen: list[Tensor] = []
    embedding.dense1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    embedding(torch.tensor([7]), torch.float32)
    frequencies = [10_000 ** (-i / 3) for i in range(4)]
    expected = [math.sin(7 * f) for f in frequencies] + [math.cos(7 * f) for f in frequencies]
    torch.testing.assert_close(seen[0], torch.tensor([expected]), rtol=0, atol=1e-5)


def test_downsampling_pads_at_the_right_and_bottom_only() -> None:
    down = Downsample(1)
    nn.init.ones_(down.conv.weight)
    nn.init.zeros_(down.conv.bias)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    # The window of the first output starts at the first pixel; the last one reaches over the edge.
    assert down(x).tolist() == [[[[45.0, 39.0], [66.0, 50.0]]]]


def test_attention_is_one_head_with_logits_times_the_root_of_the_channels() -> None:
    attention = Attention(32)
    shake(attention)
    x = torch.randn(2, 32, 3, 5, generator=seeded(7))
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).chunk(3, dim=1)
    weights = torch.einsum("bcq,bck->bqk", q, k).mul(32**-0.5).softmax(dim=-1)
    mixed = torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape)
    torch.testing.assert_close(attention(x), x + attention.proj_out(mixed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("base", "groups"), [(128, 32), (64, 32), (48, 24), (32, 16), (20, 10), (34, 17)])
def test_groups_are_32_as_in_the_paper_and_never_narrower_than_two_channels(base: int, groups: int) -> None:
    assert small(base_channels=base).down[0].blocks[0].res.norm1.num_groups == groups


@pytest.mark.parametrize(("size", "nearest"), [(30, 32), (33, 32), (28, 32), (26, 24), (3, 8)])
def test_an_image_size_that_cannot_be_halved_is_refused_with_the_nearest_that_can(size: int, nearest: int) -> None:
    with pytest.raises(UserError, match=rf"image_size={size} cannot be halved 3 times .* use {nearest}, or"):
        UNet(image_size=size)


def test_an_attention_resolution_that_never_occurs_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"never has a height of \[7, 64\]; with image_size=32 and 4 levels it has \[32,"
    ):
        UNet(image_size=32, attention_resolutions=(16, 64, 7))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": 0}, "image_size=0: use 1 or more"),
        ({"in_channels": 0}, "in_channels=0: use 1 or more"),
        ({"num_res_blocks": -1}, "num_res_blocks=-1: use 1 or more"),
        ({"base_channels": 2}, "base_channels=2: use an even number from 4 on"),
        ({"base_channels": 33}, "base_channels=33: use an even number"),
        ({"channel_mult": ()}, r"channel_mult=\(\): use one whole number"),
        ({"channel_mult": (1, 0)}, r"channel_mult=\(1, 0\): use one whole number"),
        ({"dropout": 1.0}, r"dropout=1.0: use a value in \[0, 1\)"),
        ({"dropout": math.nan}, "dropout=nan"),
    ],
)
def test_sizes_that_make_no_network_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**setting)
