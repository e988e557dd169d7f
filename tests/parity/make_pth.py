"""python tests/parity/make_pth.py: golden files of torch.save, and the values in them.

Run in an environment of its own with torch. `--check tests/parity/our_file.pth` loads what our
writer made, in both of torch.load's ways, and holds it against torch_file.npz. our_file.pth is
made where medmax_jax is: PYTHONPATH=.:tests/support:tests/checkpoints python -c "import
test_torch_file as t; t.write_ours()".
"""

import argparse
import collections
import pathlib
import warnings

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent


def flat() -> dict[str, torch.Tensor]:
    """Every way a tensor can lie in its storage."""
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return collections.OrderedDict(
        bf16=torch.randn(3, 5).bfloat16(),
        f32=torch.randn(2, 3, 4),
        f16=torch.randn(7).half(),
        f64=torch.randn(2).double(),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 5),
        transposed=torch.randn(3, 4).T,
        strided=torch.randn(8, 6).bfloat16()[1::3, ::2],
        whole=base,
        row=base[2],
        column=base[:, 5],
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
        frozen=torch.nn.Parameter(torch.randn(2), requires_grad=False),
        i64=torch.tensor([2**40, -1]),
        i32=torch.tensor([[7]], dtype=torch.int32),
        i16=torch.tensor([-300], dtype=torch.int16),
        i8=torch.tensor([-8], dtype=torch.int8),
        u8=torch.tensor([200], dtype=torch.uint8),
        boolean=torch.tensor([True, False]),
    )


def nest() -> dict:
    """A Lightning checkpoint: a state dict (with _metadata) and other entries next to it."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 2**33,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best": torch.tensor(0.25)}},
        "hyper_parameters": {"lr": 4.5e-6, "size": torch.Size([2, 3]), "dtype": torch.bfloat16},
    }


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The values; numpy has no bfloat16, so those as int16."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def check(path: str) -> None:
    """Loads a file as torch's users do, into memory and mapped, and compares."""
    expected = np.load(HERE / "torch_file.npz")
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        loaded = loaded.get("state_dict", loaded)
        assert list(loaded) == [n for n in expected if not n.startswith("nest/")], list(loaded)
        for name, tensor in loaded.items():
            found = bits(tensor)
            assert tensor.is_contiguous() and (not mmap or tensor.data_ptr() % 64 == 0), name
            assert (found.dtype, found.shape) == (expected[name].dtype, expected[name].shape), name
            assert found.tobytes() == expected[name].tobytes(), name
    print(f"{path}: {len(loaded)} tensors as in torch_file.npz, mmap or not")


if __name__ == "__main__":
    warnings.simplefilter("error")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", metavar="FILE")
    if path := parser.parse_args().check:
        check(path)
    else:
        tensors, nested = flat(), nest()
        torch.save(tensors, HERE / "torch_file.pth")
        torch.save(nested, HERE / "torch_nest.ckpt")
        weights = {f"nest/{name}": bits(t) for name, t in nested["state_dict"].items()}
        np.savez(
            HERE / "torch_file.npz", **{name: bits(t) for name, t in tensors.items()}, **weights
        )
