"""Memory of sampling: counted on tensors without data, so that a model of the paper's size fits anywhere."""
import dataclasses
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import sdit
from conftest import NumberSchedule


class Peak(TorchDispatchMode):
    """Most bytes of tensors that were alive at once, of those made inside the block: what a GPU's allocator would report."""

    def __init__(self, before):
        super().__init__()
        self.before = {t.untyped_storage()._cdata for t in before}
        self.alive, self.bytes, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for key in [key for key, (reference, _) in self.alive.items() if reference.expired()]:
            self.bytes -= self.alive.pop(key)[1]
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.before:
                reference = StorageWeakRef(t.untyped_storage())
                if reference.cdata not in self.alive:
                    self.alive[reference.cdata] = reference, t.untyped_storage().nbytes()
                    self.bytes += t.untyped_storage().nbytes()
        self.peak = max(self.peak, self.bytes)
        return out


class Discarded(dict):
    """Frames that go to disk."""

    def __setitem__(self, frame, latent):
        super().__setitem__(frame, None)


def peak_bytes(size, frames, M, steps, plain=False, depth=28):
    """Peak of denoising M frames in bfloat16, without weights and anchor bank."""
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(sample, "NoiseSchedule", NumberSchedule), \
            mock.patch.object(torch.Tensor, "isfinite", lambda x: np.array(True)):
        model = sdit.SDiT(dataclasses.replace(sdit.make_config(size, frames), depth=depth))
        for tensor in [*model.parameters(), *model.buffers()]:                  # .to() does not work on tensors without data
            tensor.data = tensor.data.to(torch.bfloat16)
        c = model.config
        conditions, settings = [torch.zeros(M, c.width, dtype=torch.bfloat16)], sample.Settings(steps)
        with Peak([*model.parameters(), *model.buffers(), *conditions]) as peak:
            if plain:
                rows, _ = sample.plan_rows(M, frames)
                x = torch.zeros(*rows.shape, c.latent_channels, c.latent_size, c.latent_size)
                sample.sample_plain(model, x, rows, [conditions[0][torch.from_numpy(rows)]], settings, frames // 2)
            else:
                sample.sample_video(model, conditions, settings, finished=Discarded())
    bank = 0 if plain else steps * c.depth * 2 * c.tokens * c.width * 2
    return peak.peak - bank


def test_memory_does_not_grow_with_the_video():
    """XL/2 but for its depth, to be quick (with all 28 blocks, 50 frames and 1003 take the same 41 MiB)."""
    short, long = (peak_bytes("XL/2", 4, M, 2, depth=3) for M in (50, 120))
    assert long < 0.1 * 2 ** 30 and long < 1.01 * short
    assert peak_bytes("XL/2", 4, 50, 1, plain=True, depth=3) > 4 * long         # the control: the paper's rule in one batch
