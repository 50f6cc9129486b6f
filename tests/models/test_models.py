"""The codec and the UNet family on tiny pipelines."""

import copy
import dataclasses
import math

import pytest
import torch

from sidcli.models.codec import Codec
from sidcli.models.kind import Cond, guided_predictions
from sidcli.models.loading import Model
from sidcli.models.sampler import Sampler
from sidcli.models.unet import UNET


def test_a_codec_scales_and_shifts_latents_as_diffusers_does_and_undoes_it_when_it_decodes(sd: Model) -> None:
    images = torch.rand(2, 3, *sd.size) * 2 - 1
    mean = sd.vae.encode(images).latent_dist.mean
    codec = sd.codec
    torch.testing.assert_close(codec.encode(images), mean * sd.vae.config.scaling_factor)
    decoded = sd.vae.decode(mean).sample
    torch.testing.assert_close(codec.decode(codec.encode(images)), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)
    assert codec.channels == sd.latent_shape[0] and codec.factor * sd.latent_shape[1] == sd.size[0]
    sd.vae.register_to_config(shift_factor=0.25)
    torch.testing.assert_close(Codec(sd.vae).encode(images), (mean - 0.25) * sd.vae.config.scaling_factor)
    torch.testing.assert_close(codec.decode(codec.encode(images)), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.check(10)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_decoded_value_that_is_not_finite_is_nan_and_the_others_stay(value: float, sd: Model) -> None:
    whole = sd.codec.decode(torch.zeros(1, *sd.latent_shape))
    sd.vae.decoder.conv_out.bias.data[1] = value
    found = sd.codec.decode(torch.zeros(1, *sd.latent_shape))
    assert found[:, 1].isnan().all() and torch.equal(found[:, ::2], whole[:, ::2])


def test_guidance_runs_the_network_on_no_more_than_its_scales_need(sd: Model) -> None:
    x, t, width = torch.randn(2, *sd.latent_shape), torch.tensor([300, 700]), sd.denoiser.config.cross_attention_dim
    cond, empty = Cond(torch.randn(2, 77, width)), Cond(torch.randn(1, 77, width))
    rows: list[int] = []

    def counted(x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        rows.append(len(x))
        return UNET.denoise(sd.denoiser, x, t, cond)

    conditional, unconditional = UNET.denoise(sd.denoiser, x, t, cond), UNET.denoise(sd.denoiser, x, t, empty.expand(2))
    for scales, count in (((1.0,), 2), ((0.0, 0.0), 2), ((1.0, 3.0), 4)):
        found = guided_predictions(counted, x, t, cond, empty, scales)
        assert rows.pop() == count
        for value, scale in zip(found, scales, strict=True):
            wanted = unconditional + scale * (conditional - unconditional)
            torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mid_block", "down_blocks.0"])
def test_blocks_are_the_networks_own_and_features_are_those_of_the_middle(name: str, sd: Model) -> None:
    assert sd.denoiser.get_submodule(name) in UNET.blocks(sd.denoiser)
    x, cond = torch.randn(2, *sd.latent_shape), Cond(torch.randn(2, 77, sd.denoiser.config.cross_attention_dim))
    with UNET.features(sd.denoiser) as collected:
        UNET.denoise(sd.denoiser, x.requires_grad_(), torch.tensor([3, 5]), cond)
    (found,) = collected
    assert found.shape[:2] == (2, sd.denoiser.config.block_out_channels[-1]) and found.requires_grad
    assert not sd.denoiser.mid_block._forward_hooks


def test_text_encoders_that_stay_on_the_cpu_give_their_cond_on_the_device(sd: Model) -> None:
    model = dataclasses.replace(copy.deepcopy(sd), text_on_cpu=True)
    sampler = Sampler(model, torch.device("meta"))
    places = {value.device.type for encoder in model.text_encoders for value in encoder.parameters()}
    assert places == {"cpu"}
    assert sampler.encode(["a cat"]).states.device.type == next(model.denoiser.parameters()).device.type == "meta"
