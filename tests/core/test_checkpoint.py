"""Checkpoints are written whole or not at all, and load bit-identically."""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from disks import mounted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssl_c2f.core import checkpoint
from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import newest_in

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def train(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    decay, rest = {"params": [model.weight], "weight_decay": 0.1, "name": "decay"}, {"params": [model.bias], "lr": 1e-3}
    optimizer = torch.optim.AdamW([decay, rest], lr=0.1 + 0.2, betas=(0.9, 0.95))
    for _ in range(steps):
        loss: Tensor = model(torch.randn(4, 3)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model, optimizer


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own, which really fills up and can really be read-only."""
    with mounted(tmp_path / "mount", "size=1m") as folder:
        yield folder


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES), st.binary(min_size=27 * 8, max_size=27 * 8))
def test_any_tensor_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype, raw: bytes
) -> None:
    source = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    values = source % 2 == 0 if dtype == torch.bool else source.view(dtype)  # NaNs with payloads, denormals, -0.0
    tensor = values[: torch.Size(shape).numel()].reshape(shape)
    path = checkpoint.save(tmp_path_factory.mktemp("c"), 1, {"model": {"t": tensor, "tied": tensor}}, {}, None, keep=1)
    assert {bits(loaded) for loaded in checkpoint.load(path).model.values()} == {bits(tensor)}


def test_optimizer_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = train(steps=3)
    tensors = {"model": model.state_dict(), "ema": {"weight": model.state_dict()["weight"].T}}
    state = {"step": 3, "loss": 0.1 + 0.2, "names": ["a", None]}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 3, tensors, state, optimizer.state_dict(), keep=1))
    assert loaded.state == state
    assert loaded.ema is not None and loaded.optimizer is not None
    assert bits(loaded.ema["weight"]) == bits(tensors["ema"]["weight"].detach())
    assert loaded.optimizer["param_groups"] == optimizer.state_dict()["param_groups"]
    for index, moments in optimizer.state_dict()["state"].items():
        assert {k: bits(v) for k, v in loaded.optimizer["state"][index].items()} == {
            k: bits(v) for k, v in moments.items()
        }


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=6, unique=True), st.integers(1, 4))
def test_the_newest_are_kept(tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int) -> None:
    folder = tmp_path_factory.mktemp("c")
    for step in sorted(steps):
        path = checkpoint.save(folder, step, {"model": {}}, {"step": step}, None, keep)
        assert newest_in(folder) == path
    assert {checkpoint.load(path).state["step"] for path in folder.iterdir()} == set(sorted(steps)[-keep:])


def test_leftovers_are_ignored_and_then_removed(tmp_path: Path) -> None:
    assert newest_in(tmp_path) is newest_in(tmp_path / "missing") is None
    (tmp_path / ".tmp-step-00000009").mkdir()
    (tmp_path / ".tmp-step-00000009" / "state.json").write_text("{")
    (tmp_path / "step-old").mkdir()  # somebody's own
    assert newest_in(tmp_path) is None
    path = checkpoint.save(tmp_path, 9, {"model": {}}, {}, None, keep=1)
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "step-old"]


def test_a_step_is_written_once(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path, 5, {"model": {}}, {"n": 1}, None, keep=1)
    assert checkpoint.save(tmp_path, 5, {"model": {}}, {"n": 1}, None, keep=1) == first


FILES = ("model.safetensors", "ema.safetensors", "state.json", "optimizer.pt")


def saved(folder: Path, step: int = 1, keep: int = 1) -> Path:
    model, optimizer = train(steps=step)
    tensors = {"model": model.state_dict(), "ema": model.state_dict()}
    return checkpoint.save(folder, step, tensors, {"a": step}, optimizer.state_dict(), keep=keep)


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_one_line(tmp_path: Path, name: str, checksums: bool) -> None:
    path = saved(tmp_path)
    if not checksums:  # as earlier versions left them
        (path / "checksums.json").unlink()
    whole = (path / name).read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        (path / name).write_bytes(whole[:size])
        with pytest.raises(UserError, match=name) as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
def test_any_other_bit_is_noticed(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    whole = (path / name).read_bytes()
    for bit in random.Random(name).sample(range(8 * len(whole)), 40):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(data)
        with pytest.raises(UserError, match=re.escape(str(path))):
            checkpoint.load(path)
    (path / name).unlink()
    if name != "checksums.json":
        with pytest.raises(UserError, match=f"{name}: .*No such file"):
            checkpoint.load(path)


def test_the_optimiser_is_of_use_in_training_only(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "optimizer.pt").write_bytes(b"junk")
    assert checkpoint.load(path, training=False).optimizer is None
    with pytest.raises(UserError, match=r"optimizer\.pt is damaged"):
        checkpoint.load(path)


def test_damaged_ones_are_set_aside_up_to_one_that_is_whole(tmp_path: Path) -> None:
    first, second, third = (saved(tmp_path, step, keep=9) for step in (1, 2, 3))
    assert checkpoint.set_aside_damaged(tmp_path) == []
    (third / "state.json").write_text("{}")
    (second / "optimizer.pt").unlink()
    told = checkpoint.set_aside_damaged(tmp_path)
    assert [line.rpartition("; ")[2] for line in told] == [
        "set aside as damaged-step-00000003, going on from step-00000002",
        "set aside as damaged-step-00000002, going on from step-00000001",
    ]
    assert checkpoint.newest_in(tmp_path) == first
    assert saved(tmp_path, 2, keep=9) == second and checkpoint.load(second).state == {"a": 2}


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"model": {}}, {}, {}, keep=1)
    (path / "checksums.json").unlink()
    torch.save({"f": os.system}, path / "optimizer.pt")
    with pytest.raises(UserError, match=r"optimizer\.pt"):
        checkpoint.load(path)


def test_full_disk(mount: Path) -> None:
    old = checkpoint.save(mount, 1, {"model": {"w": torch.ones(1000)}}, {}, None, keep=1)
    with pytest.raises(UserError, match=r"step-00000002: No space left on device \(8\.0 MB needed\)"):
        checkpoint.save(mount, 2, {"model": {"w": torch.ones(2_000_000)}}, {}, None, keep=1)
    assert list(mount.iterdir()) == [old]
    assert checkpoint.load(old).model["w"].sum() == 1000
    assert checkpoint.save(mount, 2, {"model": {"w": torch.ones(1000)}}, {}, None, keep=1).exists()


def test_read_only_folder(mount: Path) -> None:
    old = checkpoint.save(mount, 1, {"model": {}}, {}, None, keep=1)
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        checkpoint.save(mount, 2, {"model": {}}, {}, None, keep=1)
    assert newest_in(mount) == old
