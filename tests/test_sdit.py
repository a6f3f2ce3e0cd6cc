"""The model: names and shapes of published weights, the override in every layer, per-frame conditioning, files."""
import hashlib
import math

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import sdit
from conftest import random_sdit


def test_autoencoder_is_the_published_network():
    with torch.device("meta"):
        state = sdit.AutoencoderKL(sdit.AutoencoderConfig()).state_dict()
    assert len(state) == 248 and sum(p.numel() for p in state.values()) == 83_653_863
    assert state["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"].shape == (256, 128, 1, 1)
    assert state["encoder.mid_block.attentions.0.to_out.0.weight"].shape == (512, 512)
    assert state["decoder.up_blocks.2.resnets.2.conv1.weight"].shape == (256, 256, 3, 3)
    assert state["decoder.up_blocks.0.upsamplers.0.conv.weight"].shape == (512, 512, 3, 3)
    assert "decoder.up_blocks.3.upsamplers.0.conv.weight" not in state
    assert state["quant_conv.weight"].shape == (8, 8, 1, 1) and state["post_quant_conv.weight"].shape == (4, 4, 1, 1)


def test_transformer_has_the_names_of_dit():
    with torch.device("meta"):
        state = sdit.SDiT(sdit.make_config("XL/2")).state_dict()
    assert state["x_embedder.proj.weight"].shape == (1152, 4, 2, 2)
    assert state["t_embedder.mlp.0.weight"].shape == (1152, 256)
    assert state["blocks.27.attn.qkv.weight"].shape == (3456, 1152)
    assert state["blocks.27.mlp.fc2.weight"].shape == (1152, 4608)
    assert state["blocks.27.adaLN_modulation.1.weight"].shape == (6912, 1152)
    assert state["final_layer.linear.weight"].shape == (32, 1152)
    assert state["final_layer.adaLN_modulation.1.bias"].shape == (2304,)
    blocks = sum(v.numel() for k, v in state.items() if not k.startswith("mapping."))
    assert blocks == 675_129_632 - 1001 * 1152 - 256 * 1152                    # DiT-XL/2 without class table and position table


def test_sizes_by_name():
    for size in ("S/8", "B/4", "L/2", "XL/2", "demo"):
        assert sdit.make_config(size, frames=4).frames == 4
    assert sdit.make_config("B/4").tokens == 64
    with pytest.raises(sdit.UserError, match="XL/2"):
        sdit.make_config("M/2")


def test_output_shape_and_patch_order():
    model = random_sdit(frames=3)
    B, T, C, H = 2, 3, 4, 8
    out = model(torch.randn(B, T, C, H, H), torch.tensor([3, 500]), torch.randn(B, T, 32))
    assert out.shape == (B, T, 2 * C, H, H)
    tokens = torch.randn(B, T, 16, 2 * 2 * 2 * C)
    image = model.unpatchify(tokens)
    # token (row 1, column 2), pixel (1, 0) of its patch, channel 5: numbers are ordered (pixel row, pixel column, channel)
    assert torch.equal(image[:, :, 5, 1 * 2 + 1, 2 * 2 + 0], tokens[:, :, 1 * 4 + 2, (1 * 2 + 0) * 2 * C + 5])


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_anchor_is_overridden_in_every_layer(prediction):
    """Paper 3.2: "in all layers throughout the model architecture"."""
    model, anchor, seen = random_sdit(frames=4, depth=3, prediction=prediction), 2, []
    for m in (*model.blocks, model.final_layer):
        m.register_forward_pre_hook(lambda m, args: seen.append(args))
    out = model(torch.randn(3, 4, 4, 8, 8), torch.full((3,), 100), torch.randn(3, 4, 32), anchor)
    assert len(seen) == 4
    for x, c, *_ in seen:
        for tensor in (x, c):
            assert torch.equal(tensor[1:, anchor], tensor[:1, anchor].expand_as(tensor[1:, anchor]))
            assert not torch.equal(tensor[1, 0], tensor[0, 0])
    assert torch.equal(out[1, anchor], out[0, anchor]) and not torch.equal(out[1, 0], out[0, 0])


def test_rows_read_the_anchor_but_never_change_row_0():
    model = random_sdit(frames=4)
    x, c, t = torch.randn(2, 4, 4, 8, 8), torch.randn(2, 4, 32), torch.full((2,), 100)
    alone = model(x[:1], t[:1], c[:1])
    together = model(x, t, c, anchor=2)
    torch.testing.assert_close(together[:1], alone)
    assert (together[1] - model(x[1:], t[1:], c[1:])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_v_is_read_as_noise(dtype):
    """epsilon = sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) v, exactly where weights are in bfloat16
    too; the learned sigma is what it was. v so read gives back the clean latents."""
    raw, model = (random_sdit(dtype=dtype, prediction=p) for p in ("epsilon", "v"))
    x, c = torch.randn(3, 4, 4, 8, 8), torch.randn(3, 4, 32).to(dtype)
    t = torch.tensor([0, 500, 999])
    x = x.double() if dtype is torch.float64 else x
    v, sigma = raw(x, t, c).double().chunk(2, 2)
    predicted, same = model(x, t, c).double().chunk(2, 2)

    alpha_bar = sdit.NoiseSchedule().alpha_bar[t].view(3, 1, 1, 1, 1)
    expected = (1 - alpha_bar).sqrt() * x.double() + alpha_bar.sqrt() * v
    tolerance = 1e-14 if dtype is torch.float64 else 1e-6
    torch.testing.assert_close(predicted, expected, rtol=0, atol=tolerance)
    assert torch.equal(sigma, same)

    noise, x0 = torch.randn_like(x).double(), torch.randn_like(x).double()
    xt = sdit.NoiseSchedule().add_noise(x0, noise, t)
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    output = model.predict_noise(torch.cat([v, v], 2), xt, t)
    torch.testing.assert_close(output[:, :, :4], noise, rtol=0, atol=1e-12)


def test_the_gradient_of_qkv_is_written_once():
    """The backward pass of attention copies it nowhere."""
    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
                sizes.append(out.numel())
            return out

    sizes, attention = [], random_sdit(depth=1).blocks[0].attn.requires_grad_(True)
    y = attention(torch.randn(2, 4, 16, 32))[0]
    with Copies():
        y.sum().backward()
    assert max(sizes, default=0) < 3 * y.numel()


def test_attention_in_training_on_a_cpu(monkeypatch):
    """Written out in bfloat16 it agrees with the kernel, forward and backward, to rounding. Without
    gradients, or in float32, it is the kernel."""
    attention, calls = random_sdit(depth=1).blocks[0].attn, []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *qkv: calls.append(0) or kernel(*qkv))

    def attend(bf16, grad):
        calls.clear()
        g = torch.Generator().manual_seed(0)
        x = 2 * torch.randn(2, 4, 16, 32, generator=g)                          # no flat softmax
        x.requires_grad_(grad)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y, _ = attention(x)
        if grad:
            y.float().square().sum().backward()
        return y.detach().float(), x.grad, bool(calls)

    exact, exact_grad, fused = attend(bf16=False, grad=True)
    assert fused
    inference, _, fused = attend(bf16=True, grad=False)
    assert fused
    written, written_grad, fused = attend(bf16=True, grad=True)
    assert not fused
    for a, b in ((written, exact), (written, inference), (written_grad, exact_grad)):
        assert (a - b).norm() < 2e-2 * b.norm()


def test_conditioning_is_per_frame():
    """Without attention no frame hears of another, so the conditioning of a frame may change that frame alone."""
    model = random_sdit(frames=4)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    x, c, t = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 4, 32), torch.tensor([100])
    changed = c.clone()
    changed[0, 1] += 1
    moved = (model(x, t, changed) - model(x, t, c)).abs().amax((0, 2, 3, 4))
    assert moved[1] > 1e-3 and moved[[0, 2, 3]].max() == 0


def test_slots_have_a_temporal_encoding():
    model = random_sdit(frames=4)
    x, c = torch.randn(1, 1, 4, 8, 8).expand(1, 4, -1, -1, -1), torch.randn(1, 1, 32).expand(1, 4, -1)
    out = model(x, torch.tensor([100]), c)[0]
    gaps = (out[:, None] - out[None]).abs().amax((2, 3, 4))
    assert gaps[~torch.eye(4, dtype=bool)].min() > 1e-3
    assert torch.equal(model.time_position[0], torch.cat([torch.zeros(16), torch.ones(16)]))


def test_attention_is_over_space_and_time():
    model = random_sdit(frames=4)
    x, c, t = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 4, 32), torch.tensor([100])
    changed = x.clone()
    changed[0, 3, :, 7, 7] += 1                                                 # one patch of the last frame
    assert (model(changed, t, c) - model(x, t, c)).abs()[0, 0, :, :2, :2].max() > 1e-5


def test_mapping_nulls_and_drop():
    mapping = random_sdit(frames=4).mapping
    scene, landmarks = torch.nn.functional.normalize(torch.randn(2, 16), dim=1), torch.rand(2, 4, 478, 3)
    both = mapping(scene, landmarks)
    assert both.shape == (2, 4, 32)
    assert mapping(scene).shape == (2, 1, 32) and mapping(None, landmarks).shape == (2, 4, 32) and mapping().shape == (1, 1, 32)
    dropped = mapping(scene, landmarks, torch.tensor([True, False]))
    torch.testing.assert_close(dropped[0], mapping()[0].expand(4, -1))
    torch.testing.assert_close(dropped[1], both[1])
    moved = landmarks.clone()
    moved[0, 2] += 0.1
    changes = (mapping(scene, moved) - both).abs().amax(2)
    assert changes[0, 2] > 1e-4 and (changes > 0).sum() == 1


def test_statistics_normalise_the_scene():
    mapping, seen = random_sdit(frames=4).mapping, []
    mapping.input.register_forward_pre_hook(lambda _, x: seen.append(x[0][:, 0, :16]))
    mean = torch.randn(16)
    mapping.scene_mean.copy_(mean)
    mapping.scene_gain.fill_(5)
    mapping(mean + torch.eye(16))
    torch.testing.assert_close(seen[0], 5 * torch.eye(16))
    mapping(mean.expand(2, -1), None, torch.tensor([True, False]))
    expected = torch.stack([mapping.null_scene, torch.zeros(16)])               # a normalised one
    torch.testing.assert_close(seen[1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", ["demo", "XL/2"])
def test_conditioning_and_timestep_start_alike(size):
    """On a fresh model scene, landmarks and timestep move what the blocks see alike."""
    torch.manual_seed(0)
    config = sdit.make_config(size)
    config.depth = 0
    model = sdit.SDiT(config)
    mapping, S = model.mapping, config.scene_width

    # vectors all alike, and landmarks that are whitened already; statistics as train.py fills them
    scenes = torch.nn.functional.normalize(1 + torch.randn(200, S), dim=1)
    landmarks = torch.zeros(200, 1, 1434)
    landmarks[:, 0, :64] = torch.randn(200, 64)
    landmarks = landmarks.unflatten(2, (478, 3))
    mapping.scene_mean.copy_(scenes.mean(0))
    mapping.scene_gain.copy_((64 / (scenes - scenes.mean(0)).square().sum(1).mean()).sqrt())

    def movement(vectors):                                                      # (200 or 1000, D)
        return (vectors - vectors.mean(0)).norm(dim=1).square().mean().sqrt().item()

    with torch.no_grad():
        moved = [movement(mapping(scenes, landmarks[:1].expand(200, -1, -1, -1))[:, 0]),
                 movement(mapping(scenes[:1].expand(200, -1), landmarks)[:, 0]),
                 movement(model.t_embedder(torch.arange(1000)))]
    assert max(moved) < 3 * min(moved)


def test_noise_schedule_closed_forms():
    s = sdit.NoiseSchedule()
    assert s.beta[0] == 1e-4 and math.isclose(s.beta[-1], 0.02) and len(s.beta) == 1000
    x0, noise, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([10, 900])
    xt = s.add_noise(x0, noise, t)
    torch.testing.assert_close(s.predict_x0(xt, noise, t), x0, rtol=1e-4, atol=1e-4)
    # the posterior's mean of x_t without noise is x_{t-1} without noise
    clean = s.alpha_bar.sqrt()
    assert torch.allclose(s.mean_x0[1:] + s.mean_xt[1:] * clean[1:], clean[:-1], atol=1e-12)
    low, high = s.log_variance(torch.tensor([-1.0, 1.0]), torch.tensor([500, 500]))
    assert math.isclose(low, math.log(s.posterior_variance[500]), rel_tol=1e-6) and math.isclose(high, math.log(s.beta[500]), rel_tol=1e-6)


def test_autoencoder_owns_the_scale():
    torch.manual_seed(0)
    config = sdit.AutoencoderConfig(widths=(8, 16, 16), layers=1, latent_channels=3, groups=4, scale=0.5)
    model = sdit.AutoencoderKL(config).eval()
    images = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    latents = model.encode(images)
    assert latents.shape == (2, 3, 3, 4, 4) and model.decode(latents).shape == images.shape
    torch.testing.assert_close(latents[0], model.moments(images[0])[0] * 0.5)
    torch.testing.assert_close(model.decode(latents)[1], model.reconstruct(latents[1] * 2).clamp(-1, 1))


def test_files_round_trip_and_say_what_does_not_fit(tmp_path):
    model, path = random_sdit(frames=4), tmp_path / "m.safetensors"
    sdit.save_model(path, model)
    back = sdit.load_model(path)
    assert back.config == model.config and all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))
    assert not any(p.requires_grad for p in back.parameters())
    tensors, config = sdit.read_tensors(path)
    for wrong, message in ((dict(tensors) | {"final_layer.linear.bias": torch.zeros(3)}, "final_layer.linear.bias is \\(3,\\)"),
                           ({k: v for k, v in tensors.items() if k != "mapping.null_scene"}, "mapping.null_scene is missing"),
                           (dict(tensors) | {"extra": torch.zeros(1)}, "extra is \\(1,\\), expected nothing")):
        sdit.write_tensors(path, wrong, config)
        with pytest.raises(sdit.UserError, match=message):
            sdit.load_model(path)
    older = {k: v for k, v in config.items() if k != "prediction"}
    sdit.write_tensors(path, tensors, older)
    assert sdit.load_model(path).config.prediction == "epsilon"
    for wrong, message in ((older | {"unknown": 1}, "not a file of the SDiT"),
                           (older | {"prediction": "x0"}, "m.safetensors is not a model of ours")):
        sdit.write_tensors(path, tensors, wrong)
        with pytest.raises(sdit.UserError, match=message):
            sdit.load_model(path)
    with pytest.raises(sdit.UserError, match="not a file of the AutoencoderKL"):
        sdit.load_autoencoder(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(sdit.UserError, match="not a whole file of weights"):
        sdit.load_model(path)
    with pytest.raises(sdit.UserError, match="no such model file"):
        sdit.load_model(tmp_path / "none")


def original_name(name):
    """Name of one of our tensors in the layout of the autoencoder's original code, put together by hand for this test."""
    part, _, rest = name.partition(".")
    if part not in ("encoder", "decoder"):
        return name
    words = rest.split(".")
    if words[0] == "down_blocks":
        rest = f"down.{words[1]}." + (f"block.{words[3]}." if words[2] == "resnets" else "downsample.") + ".".join(words[4:])
    elif words[0] == "up_blocks":
        rest = f"up.{3 - int(words[1])}." + (f"block.{words[3]}." if words[2] == "resnets" else "upsample.") + ".".join(words[4:])
    elif words[:2] == ["mid_block", "resnets"]:
        rest = f"mid.block_{int(words[2]) + 1}." + ".".join(words[3:])
    elif words[:2] == ["mid_block", "attentions"]:
        rest = "mid.attn_1." + {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[words[3]] + "." + words[-1]
    return part + "." + rest.replace("upsample.0.", "upsample.").replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def test_published_autoencoders(tmp_path, monkeypatch):
    """Stable Diffusion's file in three layouts gives the same network; one tensor of another shape is named."""
    small = sdit.AutoencoderConfig(widths=(32, 64, 96, 96))
    monkeypatch.setattr(sdit, "AutoencoderConfig", lambda: small)               # four levels as published, narrow
    torch.manual_seed(0)
    model = sdit.AutoencoderKL(small)
    ours = model.state_dict()
    older = {k.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"): v for k, v in ours.items()}
    original = {"first_stage_model." + original_name(k): v[..., None, None] if "attentions" in k and v.dim() == 2 else v for k, v in ours.items()}
    assert "first_stage_model.decoder.up.1.upsample.conv.weight" in original and "first_stage_model.encoder.mid.attn_1.proj_out.bias" in original
    assert "first_stage_model.decoder.up.0.block.2.norm1.weight" in original and "first_stage_model.encoder.down.1.block.0.nin_shortcut.bias" in original
    safetensors.torch.save_file(ours, tmp_path / "a.safetensors")
    safetensors.torch.save_file(older, tmp_path / "b.safetensors")
    torch.save({"state_dict": original | {"model.diffusion_model.x": torch.zeros(1), "cond_stage_model.y": torch.zeros(1)}}, tmp_path / "c.ckpt")
    for name in ("a.safetensors", "b.safetensors", "c.ckpt"):
        loaded = sdit.load_autoencoder(tmp_path / name).state_dict()
        assert loaded.keys() == ours.keys() and all(torch.equal(loaded[k], ours[k]) for k in ours)
    safetensors.torch.save_file(ours | {"quant_conv.bias": torch.zeros(4)}, tmp_path / "d.safetensors")
    with pytest.raises(sdit.UserError, match=r"d.safetensors does not fit this network: quant_conv.bias is \(4,\), expected \(8,\)"):
        sdit.load_autoencoder(tmp_path / "d.safetensors")
    (tmp_path / "e.pt").write_bytes(b"torn")
    with pytest.raises(sdit.UserError, match="e.pt is not a whole file of weights"):
        sdit.load_autoencoder(tmp_path / "e.pt")


def test_named_weights(tmp_path, monkeypatch):
    """A name is downloaded once and checked; without network the sentence says where to put the file."""
    there = tmp_path / "there"
    sdit.write_tensors(there, dict(a=torch.ones(9)), {})
    whole, calls = there.read_bytes(), []

    def download(repository, file, revision):
        calls.append((repository, file, revision))
        if not there.exists():
            raise OSError("no network")
        return str(there)

    monkeypatch.setattr(data, "DOWNLOADS", tmp_path / "cache")
    monkeypatch.setattr(data.huggingface_hub, "hf_hub_download", download)
    asked = "us/known", "model.safetensors", "0123"
    monkeypatch.setattr(data, "WEIGHTS", {"known": (*asked, hashlib.sha256(whole).hexdigest()), "unknown": (*asked, None)})
    assert data.fetch("known").read_bytes() == whole and data.fetch("known").is_file() and data.fetch(there) == there
    assert calls == [asked]
    with pytest.raises(sdit.UserError, match="no such file: knwon .* known, unknown"):
        data.fetch("knwon")

    there.unlink()
    with pytest.raises(sdit.UserError, match=r"cannot download known \(no network\); .*us/known by hand and put it at .*known.safetensors"):
        data.fetch("known")
    there.write_bytes(whole[:-4])                                               # the connection broke
    (tmp_path / "cache" / "known.safetensors").unlink()
    for name in ("known", "unknown"):
        with pytest.raises(sdit.UserError, match=f"cannot download {name} "):
            data.fetch(name)
        assert not (tmp_path / "cache" / f"{name}.safetensors").exists()


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(OSError):
        sdit.write_tensors(tmp_path / "a.safetensors", dict(a=torch.ones(9)), {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
