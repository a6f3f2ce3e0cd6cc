"""demo/gpu_check.py: how it goes through its parts on a GPU, without one."""
from types import SimpleNamespace

import pytest
import torch

import data
import gpu_check
from sdit import UserError

PARTS = "environment", "equality", "training", "engines", "sampling"


@pytest.mark.parametrize("name, number", [(None, 0), ("cuda", 0), ("cuda:1", 1)])
def test_parts_on_a_gpu(name, number, monkeypatch, tmp_path):
    done = []

    def go(part):
        done.append(part)
        if part == "engines":
            raise RuntimeError("no such engine")

    for part in PARTS:
        monkeypatch.setattr(gpu_check, part, lambda *_, part=part: go(part))
    monkeypatch.setattr(data, "get_device", lambda name: torch.device(name or "cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2 ** 30))
    index = torch.cuda._utils._get_device_index                                 # as PyTorch's own reads it
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(index(device)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("peak"))
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--out", str(tmp_path / "x"), *(["--device", name] if name else [])])
    gpu_check.main()
    trainings = 4 * ["peak", "training"]                                        # T = 4 and 8, eager and compiled
    assert done == [number, "peak", "environment", "peak", "equality", *trainings, "peak", "engines", "peak", "sampling"]
    assert "| engines | all | failed RuntimeError: no such engine |" in (tmp_path / "x.md").read_text()


def test_without_a_gpu_it_says_what_to_give(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu_check.py"])
    monkeypatch.setattr(data, "get_device", lambda name: torch.device(name or "cpu"))
    with pytest.raises(UserError, match="for a rehearsal give --device cpu"):
        gpu_check.main()
