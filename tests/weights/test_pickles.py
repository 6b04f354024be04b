"""PyTorch's pickles without PyTorch: what is read, and that nothing is executed."""

import io
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from jaxdiff.weights import dvae, pickles
from jaxdiff.weights.pickles import read_tensors

torch = pytest.importorskip("torch", reason="writes the files")


@pytest.fixture
def package(monkeypatch):
    """A package whose classes stand in the pickles, and are gone when they are read."""
    module = types.ModuleType("strange.nets")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.BatchNorm1d(2))
            self.w = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
            self.note = "an attribute"

    Net.__module__, Net.__qualname__ = "strange.nets", "Net"
    module.Net = Net
    monkeypatch.setitem(sys.modules, "strange", types.ModuleType("strange"))
    monkeypatch.setitem(sys.modules, "strange.nets", module)
    return module


def test_pickled_module(package, tmp_path, monkeypatch):
    net = package.Net()
    torch.save(net, tmp_path / "net.pkl")
    monkeypatch.delitem(sys.modules, "strange.nets")
    found = read_tensors(tmp_path / "net.pkl", ("strange",))
    wanted = net.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value.numpy())
    with pytest.raises(ValueError, match=r"names 'strange\.nets\.Net'.*nothing was run"):
        read_tensors(tmp_path / "net.pkl")


def test_state_dicts(tmp_path):
    """Types, views, shared storages, and a checkpoint around them."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {"half": base.half(), "brain": base.bfloat16(), "view": base[1:3, ::2], "turned": base.T}
    state |= {"number": torch.tensor(3), "flag": torch.tensor([True, False]), "empty": torch.zeros(0, 3)}
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "checkpoint.pt")
    found = read_tensors(tmp_path / "checkpoint.pt")
    assert found.keys() == state.keys() and found["brain"].dtype.name == "bfloat16"
    for name, value in state.items():
        np.testing.assert_array_equal(found[name].astype("f8"), value.double().numpy())


class Evil:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(path, content):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", b"\0" * 16)


def by_opcodes(module, name, argument):
    """A pickle, written by hand, that calls a function by its name."""
    return b"".join([b"c", module.encode(), b"\n", name.encode(), b"\n(X", len(argument).to_bytes(4, "little"),
                     argument.encode(), b"tR."])  # fmt: skip


@pytest.mark.parametrize("way", ["reduce", "nested", "opcodes", "extension", "storage"])
def test_malicious(way, tmp_path):
    """The pickle asks for a file to be written: it is refused, and no file is there."""
    mark = tmp_path / "mark"
    command = f"touch {mark}"
    if way == "reduce":
        content = pickle.dumps(Evil(os.system, command))
    elif way == "nested":
        content = pickle.dumps({"state_dict": {"weight": [Evil(eval, f"open({str(mark)!r}, 'w')")]}})
    elif way == "opcodes":
        content = by_opcodes("posix", "system", command)
    elif way == "extension":
        content = b"\x82\x01."  # an extension code of nothing
    else:
        # A storage whose class is a function, given to the tensor builder.
        content = b"ctorch._utils\n_rebuild_tensor_v2\n(cbuiltins\nprint\nK\x00))tR."
    archive(tmp_path / "evil.pt", content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"nothing was run|damaged pickle") as refused:
        read_tensors(tmp_path / "evil.pt", ("dall_e",))
    assert sorted(tmp_path.iterdir()) == before and not mark.exists()
    assert "\n" not in str(refused.value)


def test_records_are_inert(tmp_path):
    """A function of a known package is a record too: its arguments are ignored."""
    archive(tmp_path / "odd.pt", by_opcodes("torch.nn.os", "system", f"touch {tmp_path / 'mark'}"))
    with pytest.raises(ValueError, match="no tensors in it"):
        read_tensors(tmp_path / "odd.pt")
    assert not (tmp_path / "mark").exists()


def stored(size, stride, count=4, offset=0):
    """A state dict with a tensor of one storage, with these numbers."""
    saved = io.BytesIO()

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Storage) else None

    builder = torch._utils._rebuild_tensor_v2
    Pickler(saved, 2).dump({"w": Evil(builder, Storage(), offset, size, stride, False, {})})
    return saved.getvalue()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"size": (5,), "stride": (1,)}, "beyond its storage"),
        ({"size": (2, 2), "stride": (2, 2)}, "beyond its storage"),
        ({"size": (2,), "stride": (-1,)}, "impossible shape"),
        ({"size": (2,), "stride": (1,), "offset": 3}, "beyond its storage"),
        ({"size": (1000000, 1000000), "stride": (0, 0)}, "beyond its storage"),
        ({"size": (2,), "stride": (1,), "count": 9}, "another size than stated"),
    ],
)
def test_tensors_stay_within_their_storage(numbers, message, tmp_path):
    archive(tmp_path / "good.pt", stored((2, 2), (2, 1)))
    assert read_tensors(tmp_path / "good.pt")["w"].shape == (2, 2)
    archive(tmp_path / "bad.pt", stored(**numbers))
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "bad.pt")


def test_damaged(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "good.pt")
    torch.save({"w": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt").write_text("no weights")
    archive(tmp_path / "cut.pt", pickle.dumps({"w": 1})[:-3])
    archive(tmp_path / "nothing.pt", pickle.dumps({"w": 1}))
    for name, message in (
        ("old", "1.6"),
        ("short", "1.6"),
        ("text", "1.6"),
        ("cut", "damaged"),
        ("nothing", "no tens"),
    ):
        with pytest.raises(ValueError, match=message):
            read_tensors(tmp_path / f"{name}.pt")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "missing.pt")
    nested = {}
    for _ in range(pickles.LONGEST_PATH + 2):
        nested = {"inner": nested, "w": torch.ones(1)}
    torch.save(nested, tmp_path / "deep.pt")
    with pytest.raises(ValueError, match="deeper"):
        read_tensors(tmp_path / "deep.pt")


def test_the_package_is_openais():
    assert dvae.PACKAGE == "dall_e"
