"""sDiT, the diffusion transformer for short sequences of frames, and its autoencoder.

"The paper" is Anchored Diffusion for Video Face Reenactment, arXiv 2407.15153.

    SDiTConfig, make_config     the sizes, "XL/2" ... "demo"
    Attention, Block, Mapping   the building blocks
    SDiT                        the denoiser (paper 3.1); `forward` is anchored by `override` (3.2)
    NoiseSchedule               the diffusion process that it inverts
    AutoencoderKL               pixels <-> latents (the network of Stable Diffusion)
    save_model, load_model      safetensors files that carry their own configuration

Shapes use one alphabet in the whole repository: B rows (sequences in a batch), T frames in a row, N
tokens of a frame, D width, d width of a head, (C, H, W) the latent of a frame, (h, w) its pixels, p
side of a patch, M frames of a whole video, S width of the scene vector, 478 landmarks.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

LANDMARKS = 478  # points of MediaPipe's face mesh with irises (paper 4.2)
LANDMARK_COMPONENTS = 64  # principal components of them that the mapping network reads


class UserError(ValueError):
    """Bad input: a sentence that names the file and the cure. See `data.run_main`."""

    def __init__(self, text, code=2):
        super().__init__(text)
        self.code = code


def has_bf16(device):
    """Whether the device multiplies matrices in bfloat16 in hardware; elsewhere it is slower than
    float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# --------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class SDiTConfig:
    """What a model file needs to say about itself; travels as JSON in its metadata."""

    name: str = "XL/2"
    depth: int = 28
    width: int = 1152  # D
    heads: int = 16
    patch: int = 2
    frames: int = 8  # T
    latent_channels: int = 4  # C
    latent_size: int = 32  # H = W
    scene_width: int = 768  # S, CLIP ViT-L/14
    autoencoder: str = ""  # file name and sha256 of what the latents and the scenes were made with
    autoencoder_sha256: str = ""
    clip: str = ""
    clip_sha256: str = ""
    prediction: str = "epsilon"  # or "v", see `SDiT.predict_noise`
    # mean scene vector of the training set, (S,): train.py recognises the data by it
    scene_mean: list = dataclasses.field(default_factory=list)

    @property
    def tokens(self):
        """N, tokens of a frame."""
        return (self.latent_size // self.patch) ** 2

    def is_possible(self):
        whole = self.width % self.heads == 0 and self.latent_size % self.patch == 0
        return whole and self.prediction in ("epsilon", "v")


# Depth, width and heads of DiT (paper 4.1 names "sDiT-XL"; its numbers are DiT-XL's)
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DEMO_SIZE = dict(depth=6, width=192, heads=6, latent_channels=16, latent_size=16, scene_width=128)


def make_config(name, frames=8, **rest):
    """Configuration by name: "S/2" ... "XL/8" (paper D: 256 pixels, so latents 4 x 32 x 32) or
    "demo"."""
    size, _, patch = name.partition("/")
    if name == "demo":
        sizes = DEMO_SIZE
    elif size in SIZES and patch in ("2", "4", "8"):
        sizes = dict(zip(("depth", "width", "heads"), SIZES[size]), patch=int(patch))
    else:
        known = ", ".join(SIZES)
        raise UserError(
            f"no model size {name!r}; choose demo or {known} with /2, /4 or /8, as XL/2"
        )

    config = SDiTConfig(name=name, frames=frames, **sizes | rest)
    if config.latent_size % config.patch:
        side = config.latent_size
        raise UserError(
            f"patches of {config.patch} do not divide latents of {side} x {side}; choose another "
            f"size of patches, or cache clips at another --size"
        )
    return config


# --------------------------------------------------------------------------------------------------
# Building blocks


def sinusoid(width, positions):
    """(P,) positions -> (P, width): sines in the first half, cosines in the second."""
    rate = 1e4 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = positions.double()[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], 1).float()


def spatial_encoding(width, side):
    """2-D sine-cosine encoding (side * side, width): first half x, second half y (DiT's; paper
    silent)."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([sinusoid(width // 2, x.flatten()), sinusoid(width // 2, y.flatten())], 1)


def modulate(x, shift, scale):
    """Adaptive layer norm of x (B, T, N, D) with one shift and scale (B, T, 1, D) a frame."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def attend(q, k, v):
    """Attention over (B, heads, tokens, d)."""
    # training on a CPU: the fused kernel's backward pass is slower there than plain products
    if q.requires_grad and q.device.type == "cpu" and q.dtype is torch.bfloat16:
        with torch.autocast("cpu", enabled=False):  # softmax in bfloat16
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class AnchorBank:
    """Keys and values of the anchor in every layer: a key-value cache of one frame (paper 3.2), for
    one pass through the blocks. With `slot`, row 0 writes those of its anchor; without, other rows
    read `kv`, a tensor (2, 1, heads, N, d) for each layer.

    Why that equals `override`: a row attends within itself, so row 0 is what it would be alone.
    Under `override`, the anchor's tokens of other rows are row 0's at the input of every layer. The
    other tokens meet them in attention only, as keys and values, whose order does not matter."""

    def __init__(self, slot=None, kv=()):
        self.slot, self.written, self.unread = slot, [], iter(kv)

    def attend(self, q, k, v, N):
        """Attention in the next layer, of rows (B, heads, TN, d); where they read, they have no
        anchor of their own, and (T - 1) N tokens."""
        if self.slot is not None:
            tokens = slice(self.slot * N, (self.slot + 1) * N)
            self.written.append(torch.stack([k[:1, :, tokens], v[:1, :, tokens]]))
        else:
            kv = next(self.unread).expand(-1, k.shape[0], -1, -1, -1)  # (2, B, heads, N, d)
            k, v = torch.cat([k, kv[0]], 2), torch.cat([v, kv[1]], 2)  # (B, heads, TN, d)
        return attend(q, k, v)


class Attention(nn.Module):
    """Joint space-time attention: every token of a row attends to all T * N. Paper silent on the
    scope; in 3.2 tokens "attend to and align with the anchor tokens", across frames."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, bank=None):
        B, T, N, D = x.shape

        # unbound before the transpose: the backward pass then writes the gradient of qkv once
        parts = self.qkv(x).view(B, T * N, 3, self.heads, D // self.heads).unbind(2)
        q, k, v = (z.transpose(1, 2) for z in parts)  # (B, heads, TN, d)
        x = attend(q, k, v) if bank is None else bank.attend(q, k, v, N)
        return self.proj(x.transpose(1, 2).reshape(B, T, N, D))  # from (B, heads, TN, d)


class MLP(nn.Sequential):  # applied in the order of assignment
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU("tanh")
        self.fc2 = nn.Linear(hidden, width)


class Block(nn.Module):
    """DiT's adaLN-Zero block, with shift, scale and gate of its own for every frame (paper 3.1:
    "per-frame conditioning signals (C_t), incorporated into our sDiT through adaptive layer
    normalization")."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = MLP(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, bank=None):
        """Tokens x (B, T, N, D); c (B, T, D), the conditioning plus the timestep's embedding."""
        modulation = self.adaLN_modulation(c).unsqueeze(2)  # (B, T, 1, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        x = x + gate1 * self.attn(modulate(x, shift1, scale1), bank)
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).unsqueeze(2).chunk(2, -1)  # (B, T, 1, D)
        return self.linear(modulate(x, shift, scale))  # (B, T, N, p * p * 2C)


class PatchEmbed(nn.Module):
    def __init__(self, channels, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, latents):
        B, T = latents.shape[:2]  # of (B, T, C, H, W)
        x = self.proj(latents.flatten(0, 1))  # (BT, D, H / p, W / p)
        x = x.flatten(2).transpose(1, 2).unflatten(0, (B, T))  # (B, T, N, D)
        return x.contiguous()  # or every sum of the blocks would be laid out as the convolution is


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps):
        """(B,) integers -> (B, D); angles in float32 whatever the precision of the weights, cosines
        first, as DiT's weights have it."""
        waves = torch.arange(128, dtype=torch.float32, device=timesteps.device)
        rate = torch.exp(-math.log(1e4) / 128 * waves)
        angle = timesteps.float()[:, None] * rate
        return self.mlp(torch.cat([angle.cos(), angle.sin()], 1).to(self.mlp[0].weight.dtype))


class ResidualMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = MLP(width, width)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Mapping(nn.Module):
    """The mapping network (paper 3.1) mixes the scene and the landmarks into every frame's
    conditioning, by four residual blocks (paper 4.1; silent on fusion, width and activation:
    concatenated, at the transformer's width, pre-norm, GELU).

    Both are normalised by statistics of the training set. The landmarks are whitened, else the
    head's movements drown eyelids and gaze. The scene is centred, since CLIP vectors of faces are
    alike, and scaled to the same total variance."""

    def __init__(self, width, scene_width, blocks=4):
        super().__init__()
        self.null_scene = nn.Parameter(torch.zeros(scene_width))
        self.null_landmarks = nn.Parameter(torch.zeros(LANDMARK_COMPONENTS))
        self.input = nn.Linear(scene_width + LANDMARK_COMPONENTS, width)
        self.blocks = nn.Sequential(*[ResidualMLP(width) for _ in range(blocks)])

        # Set by `data.Rows.statistics`. The basis (1434, 64) holds principal components, divided by
        # their standard deviations. Until then scenes are taken to have a total variance of 1.
        self.register_buffer("landmark_mean", torch.zeros(LANDMARKS, 3))
        self.register_buffer("landmark_basis", torch.eye(3 * LANDMARKS, LANDMARK_COMPONENTS))
        self.register_buffer("scene_mean", torch.zeros(scene_width))
        self.register_buffer("scene_gain", torch.tensor(LANDMARK_COMPONENTS**0.5))

        # Before training the blocks' output varies by about 1, and the embedded timestep, to which
        # C_t is added, by this much: 0.02 sqrt(96) from its first layer (96 of 128 frequencies pass
        # a radian within 1000 steps), times 1 / 2 (SiLU's slope at 0), times 0.02 sqrt(D) from its
        # second.
        self.register_buffer("output_gain", torch.tensor(0.02**2 / 2 * math.sqrt(96 * width)))

    def forward(self, scene=None, landmarks=None, drop=None):
        """scene (B, S), landmarks (B, T, 478, 3), or None; `drop` (B,) bool: rows that lose both.

        Returns the conditioning (B, T, D). Without landmarks T is 1, and B without all three."""
        if scene is None:
            scene = self.null_scene[None]
        else:
            scene = (scene - self.scene_mean) * self.scene_gain  # (B, S)

        if landmarks is None:
            landmarks = self.null_landmarks[None, None]
        else:
            # bfloat16 would round small movements away
            with torch.autocast(landmarks.device.type, enabled=False):
                landmarks = (landmarks - self.landmark_mean).flatten(2)  # (B, T, 1434)
                landmarks = landmarks @ self.landmark_basis  # (B, T, LANDMARK_COMPONENTS)

        if drop is not None:
            scene = torch.where(drop[:, None], self.null_scene, scene)
            landmarks = torch.where(drop[:, None, None], self.null_landmarks, landmarks)

        B, T = max(len(scene), len(landmarks)), landmarks.shape[1]
        scene, landmarks = scene[:, None].expand(B, T, -1), landmarks.expand(B, T, -1)
        mixed = self.input(torch.cat([scene, landmarks], -1))  # (B, T, D)
        return self.blocks(mixed) * self.output_gain


# --------------------------------------------------------------------------------------------------
# The model


def override(x, anchor, axis=1):
    """Eq. 3: the anchor's slot of every row becomes that of row 0. x has rows on its first axis and
    slots on `axis`; `anchor` is a slot, or None for no anchoring."""
    if anchor is None:
        return x
    slots = torch.arange(x.shape[axis], device=x.device).view(-1, *[1] * (x.dim() - axis - 1))
    return torch.where(slots == anchor, x[:1], x)


class SDiT(nn.Module):
    """Denoiser of T frames at once (paper 3.1). Parameters have DiT's published names."""

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.width
        self.x_embedder = PatchEmbed(config.latent_channels, config.patch, D)
        self.t_embedder = TimestepEmbedder(D)
        self.mapping = Mapping(D, config.scene_width)
        self.blocks = nn.ModuleList([Block(D, config.heads) for _ in range(config.depth)])
        self.final_layer = FinalLayer(D, config.patch**2 * 2 * config.latent_channels)
        position = spatial_encoding(D, config.latent_size // config.patch)
        self.register_buffer("position", position, persistent=False)  # (N, D)
        time_position = sinusoid(D, torch.arange(config.frames))
        self.register_buffer("time_position", time_position, persistent=False)  # (T, D)
        self.roots = NoiseSchedule(position.device).roots  # not a buffer, which `to` would round
        self.initialise()

    def _apply(self, fn, recurse=True):
        """Called by `to`: the schedule follows to the device, in a precision of its own."""
        super()._apply(fn, recurse)
        self.roots = NoiseSchedule(self.position.device).roots
        return self

    def initialise(self):
        """Paper D: "standard weight initialization techniques from ViT"; read as in DiT: Xavier,
        with every block the identity and the output zero at the start."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        patches = self.x_embedder.proj  # a linear layer that is written as a convolution
        nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
        nn.init.zeros_(patches.bias)

        for i in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[i].weight, std=0.02)
        nn.init.normal_(self.mapping.null_scene, std=0.02)
        nn.init.normal_(self.mapping.null_landmarks, std=0.02)

        for m in (*self.blocks, self.final_layer):  # adaLN-Zero
            nn.init.zeros_(m.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def embed(self, latents, time_position):
        """Tokens (B, T, N, D) of latents (B, T, C, H, W), in slots encoded by time_position (T, D),
        or (B, T, D) where rows differ.

        The temporal encoding (paper 3.1: TPE_1 ... TPE_T) is that of the slot; real time is left to
        the conditioning. Paper silent on where: added at the input."""
        position = self.position + time_position.unsqueeze(-2)  # (T, N, D) or (B, T, N, D)
        return self.x_embedder(latents.to(position.dtype)) + position

    def unpatchify(self, x):
        """(B, T, N, p * p * 2C) -> (B, T, 2C, H, W)."""
        p, side = self.config.patch, self.config.latent_size // self.config.patch
        x = x.unflatten(2, (side, side)).unflatten(4, (p, p, -1))
        # (B, T, H / p, W / p, p, p, 2C) -> (B, T, 2C, H / p, p, W / p, p)
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def predict_noise(self, output, latents, timesteps):
        """The network's output (B, T, 2C, H, W) with its first half turned into noise; the second
        half, the learned sigma, stays.

        The paper's network predicts the noise eps, as DiT does. With v-prediction (Salimans and Ho
        2022) it predicts v = sqrt(abar) eps - sqrt(1 - abar) x_0, and so eps is sqrt(1 - abar) x_t
        + sqrt(abar) v: the network need not copy x_t, which comes in here in float32."""
        if self.config.prediction == "epsilon":
            return output

        dtype = torch.promote_types(output.dtype, torch.float32)
        roots = self.roots.to(latents.device, dtype).index_select(1, timesteps)  # (2, B)
        root_abar, root_rest = roots.view(2, -1, 1, 1, 1, 1).unbind(0)  # (B, 1, 1, 1, 1)
        velocity, mix = output.to(dtype).chunk(2, 2)  # (B, T, C, H, W)
        return torch.cat([root_rest * latents.to(dtype) + root_abar * velocity, mix], 2)

    def forward(self, latents, timesteps, conditioning, anchor=None):
        """One denoising evaluation, and the definition of anchoring.

        latents (B, T, C, H, W), timesteps (B,) in 0..999, conditioning (B, T, D) from
        `self.mapping`. With `anchor`, a slot, all rows have one timestep, and `override` gives rows
        1.. what row 0 has in it: latents, conditioning, and tokens, after the embedding and after
        every block (Eq. 3; "in all layers throughout the model architecture"). Returns (B, T, 2C,
        H, W): the noise, then the learned sigma, `mix` of `NoiseSchedule.log_variance`."""
        time_position = self.time_position[: latents.shape[1]]  # (T, D)
        return self.run_blocks(
            latents, timesteps, conditioning, time_position, lambda x: override(x, anchor)
        )

    def forward_first(self, latents, timesteps, conditioning, anchor):
        """`forward` of row 0 alone, (1, T, ...): what it makes of its anchor is what all rows read.

        Returns the output (1, T, 2C, H, W) and the keys and values of the anchor in every block,
        (depth, 2, 1, heads, N, d)."""
        time_position = self.time_position[: latents.shape[1]]  # (T, D)
        bank = AnchorBank(anchor)
        output = self.run_blocks(latents, timesteps, conditioning, time_position, bank=bank)
        return output, torch.stack(bank.written)

    def forward_rest(self, latents, timesteps, conditioning, anchor, anchor_kv):
        """`forward` of rows 1.. without their anchors: latents (B, T - 1, C, H, W), conditioning
        (B, T - 1, D), and `anchor_kv` of `forward_first` at the same timestep -> (B, T - 1, 2C, H,
        W). `AnchorBank` says why the result is the same."""
        others = torch.cat([self.time_position[:anchor], self.time_position[anchor + 1 :]])
        time_position = others[: latents.shape[1]]  # (T - 1, D)
        bank = AnchorBank(kv=anchor_kv)
        return self.run_blocks(latents, timesteps, conditioning, time_position, bank=bank)

    def run_blocks(
        self, latents, timesteps, conditioning, time_position, share_anchor=lambda x: x, bank=None
    ):
        """The transformer, on frames in slots that are encoded by time_position (see `embed`). Rows
        share an anchor by `override`, by the keys and values in `bank`, or not at all."""
        latents = share_anchor(latents)  # (B, T, C, H, W)

        # added, as DiT adds its class (paper silent on how timestep and conditioning meet)
        c = share_anchor(self.t_embedder(timesteps)[:, None] + conditioning)  # (B, T, D)
        x = share_anchor(self.embed(latents, time_position))  # (B, T, N, D)
        for block in self.blocks:
            x = share_anchor(block(x, c, bank))

        output = self.unpatchify(self.final_layer(x, c))  # (B, T, 2C, H, W)
        return self.predict_noise(output, latents, timesteps)


# --------------------------------------------------------------------------------------------------
# The diffusion process


class NoiseSchedule:
    """DiT's process (paper D: "We retain diffusion hyperparameters from DiT, including t_max = 1000
    and a learned sigma routine"): beta from 1e-4 to 0.02, linear. Its attributes are tensors
    (.., 1000) in float64, on a GPU in float32."""

    steps = 1000

    def __init__(self, device="cpu"):
        beta = torch.linspace(1e-4, 0.02, self.steps, dtype=torch.float64, device="cpu")
        alpha_bar = torch.cumprod(1 - beta, 0)
        previous = F.pad(alpha_bar[:-1], (1, 0), value=1.0)
        self.beta, self.alpha_bar = beta, alpha_bar
        self.roots = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()])  # of signal and noise

        # q(x_{t-1} | x_t, x_0) = N(mean_x0 x_0 + mean_xt x_t, posterior_variance): DDPM, Eq. 6, 7
        self.posterior_variance = beta * (1 - previous) / (1 - alpha_bar)
        self.posterior_variance[0] = self.posterior_variance[1]  # it is 0, whose log is infinite
        self.mean_x0 = beta * previous.sqrt() / (1 - alpha_bar)
        self.mean_xt = (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar)

        dtype = torch.float32 if torch.device(device).type == "cuda" else torch.float64
        for name, value in vars(self).items():
            setattr(self, name, value.to(device, dtype))

    def at(self, values, t, like):
        """values (1000,) at timesteps t (B,), shaped to multiply `like` (B, ...)."""
        return values[t].to(like.dtype).view(-1, *[1] * (like.dim() - 1))

    def add_noise(self, x0, noise, t):
        """x_t of clean latents x0 (B, ...) at timesteps t (B,)."""
        root_abar, root_rest = (self.at(root, t, x0) for root in self.roots)
        return root_abar * x0 + root_rest * noise

    def predict_x0(self, xt, noise, t):
        """The clean latents that x_t and its noise imply."""
        root_abar, root_rest = (self.at(root, t, xt) for root in self.roots)
        return (xt - root_rest * noise) / root_abar

    def log_variance(self, mix, t):
        """Learned sigma: `mix`, -1 to 1 but not bounded, interpolates between the logarithms of the
        posterior variance and of beta (Improved DDPM, Eq. 15)."""
        low, high = (self.at(x.log(), t, mix) for x in (self.posterior_variance, self.beta))
        return low + (mix + 1) / 2 * (high - low)


# --------------------------------------------------------------------------------------------------
# The autoencoder: Stable Diffusion's AutoencoderKL (paper 3.1, D), with its published names


@dataclass
class AutoencoderConfig:
    """The defaults are those of sd-vae-ft-mse and sd-vae-ft-ema: 256 pixels -> 4 x 32 x 32."""

    widths: tuple = (128, 256, 512, 512)  # of the levels; each but the last halves the picture
    layers: int = 2  # residual blocks a level (the decoder has one more)
    latent_channels: int = 4
    groups: int = 32
    scale: float = 0.18215  # brings the standard deviation of latents to about 1

    @property
    def factor(self):
        """h / H."""
        return 2 ** (len(self.widths) - 1)

    def is_possible(self):
        return 1 <= len(self.widths) <= 8


class ResnetBlock(nn.Module):
    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y + self.conv_shortcut(x)


class SpatialAttention(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x):
        y = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, HW, width): one head
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out(y)[:, 0].transpose(1, 2).view_as(x)


class Downsample(nn.Sequential):
    def __init__(self, width):
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))  # right and bottom only, as published
        self.conv = nn.Conv2d(width, width, 3, stride=2)


class Upsample(nn.Sequential):
    def __init__(self, width):
        super().__init__()
        self.double = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.conv = nn.Conv2d(width, width, 3, padding=1)


class Level(nn.Sequential):
    """Residual blocks at one resolution, then a halving or doubling of it."""

    def __init__(self, inputs, outputs, layers, groups, resample=None):
        super().__init__()
        widths = [inputs] + [outputs] * layers
        self.resnets = nn.Sequential(*[ResnetBlock(a, b, groups) for a, b in pairwise(widths)])
        if resample is Downsample:
            self.downsamplers = nn.Sequential(Downsample(outputs))
        elif resample is Upsample:
            self.upsamplers = nn.Sequential(Upsample(outputs))


def make_levels(widths, layers, groups, resample):
    """A level of each width; all but the last are followed by `resample`."""
    *pairs, last = pairwise([widths[0], *widths])  # (inputs, outputs)
    levels = [Level(*pair, layers, groups, resample) for pair in pairs]
    return nn.Sequential(*levels, Level(*last, layers, groups))


class MidBlock(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.attentions = nn.ModuleList([SpatialAttention(width, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(width, width, groups) for _ in range(2)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Sequential):
    """Images (B, 3, h, w) -> (B, 2C, H, W), layer by layer."""

    def __init__(self, config):
        super().__init__()
        first, last = config.widths[0], config.widths[-1]
        self.conv_in = nn.Conv2d(3, first, 3, padding=1)
        self.down_blocks = make_levels(config.widths, config.layers, config.groups, Downsample)
        self.mid_block = MidBlock(last, config.groups)
        self.conv_norm_out = nn.GroupNorm(config.groups, last, eps=1e-6)
        self.act = nn.SiLU()
        self.conv_out = nn.Conv2d(last, 2 * config.latent_channels, 3, padding=1)


class Decoder(nn.Sequential):
    """Latents (B, C, H, W) -> (B, 3, h, w), layer by layer."""

    def __init__(self, config):
        super().__init__()
        widths, layers, groups = config.widths[::-1], config.layers + 1, config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = make_levels(widths, layers, groups, Upsample)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)


class AutoencoderKL(nn.Module):
    """Pixels (.., 3, h, w) in [-1, 1] <-> latents (.., C, H, W) of standard deviation about 1, with
    h = H * `config.factor`. Nothing outside this class knows the scale of latents."""

    def __init__(self, config):
        super().__init__()
        self.config, channels = config, config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def moments(self, images):
        """images (B, 3, h, w) -> mean and log-variance (B, C, H, W) of the unscaled latents."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, z):
        """Images of unscaled latents z (B, C, H, W), for training."""
        return self.decoder(self.post_quant_conv(z))

    def encode(self, images):
        """Latents of images: the mean, not a sample (paper silent; the cache is deterministic)."""
        mean, _ = self.moments(images.flatten(0, -4))
        return mean.unflatten(0, images.shape[:-3]) * self.config.scale

    def decode(self, latents):
        """Latents (.., C, H, W) -> images (.., 3, h, w) in [-1, 1]."""
        images = self.reconstruct(latents.flatten(0, -4) / self.config.scale)
        return images.unflatten(0, latents.shape[:-3]).clamp(-1, 1)


# --------------------------------------------------------------------------------------------------
# Files


def hidden(path, ending):
    """A hidden file beside `path` for work on it. No process number is in its name: what a killed
    run leaves there, the next one takes over."""
    name = os.fsencode(Path(path).name)
    if len(name) > 200:  # file systems end at 255 bytes
        name = b"%08x" % zlib.crc32(name)
    return Path(path).with_name(f".{os.fsdecode(name)}{ending}")


@contextlib.contextmanager
def atomic(path):
    """A temporary path that becomes `path` when the block ends well; otherwise it is deleted."""
    temporary = hidden(path, f".tmp{Path(path).suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as e:
        if isinstance(e, UserError) or shutil.disk_usage(Path(path).parent).free > 2**20:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path, tensors, config):
    """Write a safetensors file whose metadata is `config` as JSON, whole or not at all."""
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    with atomic(path) as temporary:  # save_file would make it readable by its owner only
        temporary.write_bytes(safetensors.torch.save(tensors, {"config": json.dumps(config)}))


def open_tensors(path):
    """A safetensors file, memory-mapped. It refuses names not in UTF-8: those go by a link."""
    with contextlib.ExitStack() as stack:
        if os.fsencode(path) != str(path).encode(errors="replace"):
            link = Path(stack.enter_context(tempfile.TemporaryDirectory()), "link")
            link.symlink_to(Path(path).absolute())
            path = link
        return safetensors.safe_open(path, "pt")


def read_tensors(path):
    """(tensors, config) of a model file: safetensors, with the config of its metadata, or {}; or a
    checkpoint of PyTorch, loaded with weights_only=True."""
    if not Path(path).is_file():
        raise UserError(f"no such model file: {path}")
    try:
        if Path(path).suffix in (".pt", ".pth", ".ckpt", ".bin"):
            return load_pickle(path), {}
        with open_tensors(path) as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}
            return tensors, dict(json.loads((f.metadata() or {}).get("config", "{}")))
    except Exception as e:  # torch raises a dozen kinds for a torn file
        reason = str(e).partition("\n")[0]
        if "weights_only" in str(e) or "Unpickl" in type(e).__name__:
            reason = "it holds more than tensors, or is torn"  # PyTorch's advice: load it anyway
        raise UserError(
            f"{path} is not a whole file of weights, or not of weights alone ({reason}); make or "
            f"fetch it again"
        ) from None


def load_pickle(path):
    """The tensors of a checkpoint of PyTorch, and nothing else that it may hold."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type for part in archive.infolist()):  # PyTorch never does
                raise ValueError("it is compressed")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    tensors = tensors.get("state_dict", tensors)
    return {k: v for k, v in tensors.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}


def check_fit(model, tensors, path):
    """UserError where names or shapes of the tensors read from `path` are not the model's."""
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    for name in [*wanted, *found]:
        here, there = found.get(name, "missing"), wanted.get(name, "nothing")
        if here != there:
            raise UserError(f"{path} does not fit this network: {name} is {here}, expected {there}")


def fill(model, tensors, path):
    """`model` with the weights `tensors` read from `path`, in the model's precision."""
    check_fit(model, tensors, path)
    model.load_state_dict(tensors)
    return model


def build(network, tensors, path):
    """`network()` with the weights `tensors`. First without memory: what a file says of its sizes
    is not believed before its tensors have them."""
    try:
        with torch.device("meta"):
            outline = network()
    except (ValueError, RuntimeError, ArithmeticError, AssertionError, TypeError) as e:
        reason = f"{path} is not a model of ours: its sizes do not go together ({e})"
        raise UserError(reason) from None
    check_fit(outline, tensors, path)
    return fill(network(), tensors, path)


# The largest sizes of a configuration that are believed; 2**16 for others
LARGEST = dict(depth=1000, layers=1000, latent_size=256, latent_channels=1024, frames=10_000)


def is_like(value, like, name=""):
    """Whether names, kinds and sizes of a file's configuration match those of `like`."""
    if isinstance(like, dict):
        known = isinstance(value, dict) and set(value) <= set(like)
        return known and all(is_like(v, like[k], k) for k, v in value.items())
    if isinstance(like, list | tuple):
        first = like[0] if like else 1.0
        return isinstance(value, list | tuple) and all(is_like(v, first, name) for v in value)
    if isinstance(like, float):
        return type(value) in (int, float) and math.isfinite(value)
    if type(like) is int:
        return type(value) is int and 1 <= value <= LARGEST.get(name, 2**16)
    return type(value) is type(like)


def check_config(config_class, config, path):
    """The configuration in a file, of known kinds and sizes."""
    defaults = config_class()
    if is_like(config, vars(defaults)):
        config = dataclasses.replace(defaults, **config)
        if config.is_possible():
            return config
    raise UserError(f"{path} is not a model of ours: its configuration holds what none can have")


def save_model(path, model, dtype=torch.float32):
    """Save an SDiT or an AutoencoderKL with its configuration."""
    tensors = {k: v.to(dtype) for k, v in model.state_dict().items()}
    write_tensors(path, tensors, dataclasses.asdict(model.config))


def _load(path, tensors, config, device, network, config_class):
    added = {"prediction"}  # older files lack it
    if set(config) | added != set(vars(config_class())) | added:
        cure = "; of a training run, give model.safetensors" if Path(path).suffix == ".pt" else ""
        raise UserError(
            f"{path} is not a file of the {network.__name__}: its metadata does not hold that "
            f"network's configuration{cure}"
        )
    config = check_config(config_class, config, path)
    model = build(lambda: network(config), tensors, path)
    return model.to(device).eval().requires_grad_(False)


def load_model(path, device="cpu"):
    """The SDiT of a model file, float32, in evaluation mode."""
    return _load(path, *read_tensors(path), device, SDiT, SDiTConfig)


# Names in the original code (kl-f8) and in diffusers before 0.15 -> diffusers' and ours, one after
# the other
RENAMED = {
    "first_stage_model.": "",
    ".down.": ".down_blocks.",
    ".up.": ".up_blocks.",
    ".block.": ".resnets.",
    "nin_shortcut": "conv_shortcut",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1": "mid_block.attentions.0",
    ".norm_out": ".conv_norm_out",
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".proj_out.": ".to_out.0.",
}
PARTS = "encoder.", "decoder.", "quant_conv.", "post_quant_conv."


def in_our_layout(tensors):
    """The autoencoder's tensors of a published file, with diffusers' names, which are ours. Whole
    Stable Diffusion and training checkpoints hold other networks, too, which are dropped."""
    ours = {}
    for name, value in tensors.items():
        # the original code counts the decoder's levels from the other end
        name = re.sub(r"(decoder\.up)\.(\d)", lambda m: f"{m[1]}.{3 - int(m[2])}", name)
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if name.startswith(PARTS):
            one_by_one = "attentions" in name and value.dim() == 4  # convolutions there
            ours[name] = value.flatten(1) if one_by_one else value
    return ours


def load_autoencoder(path, device="cpu"):
    """The frozen AutoencoderKL (paper 3.1) of a file: ours, or a published one (of Stable Diffusion
    1 and 2, in any layout)."""
    tensors, config = read_tensors(path)
    if not config:
        tensors, config = in_our_layout(tensors), dataclasses.asdict(AutoencoderConfig())
    model = _load(path, tensors, config, device, AutoencoderKL, AutoencoderConfig)
    return model.to(memory_format=torch.channels_last)
