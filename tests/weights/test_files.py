"""Files of tensors: what comes back is what was written, and a bad file is refused with its name and the reason."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from imagereward_jax.storage.errors import WriteError
from imagereward_jax.weights.files import WeightsError, cast, read_json, read_tensors, write_safetensors

RNG = np.random.default_rng(0)
TENSORS = {
    "float32": RNG.standard_normal((3, 4)).astype(np.float32),
    "transposed": RNG.standard_normal((3, 4)).astype(np.float32).T,
    "float16": RNG.standard_normal(5).astype(np.float16),
    "bfloat16": RNG.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
    "int64": np.arange(7),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype, array.shape), name
        assert tensors[name].tobytes() == array.tobytes(), name


def test_safetensors_come_back_to_the_bit(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", TENSORS)
    assert_same(read_tensors(tmp_path / "a.safetensors"), TENSORS)


def test_pytorch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    write_safetensors(tmp_path / "a.safetensors", TENSORS)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded["bfloat16"].dtype == torch.bfloat16
    for name, array in TENSORS.items():
        assert np.array_equal(loaded[name].double().numpy(), array.astype(np.float64)), name


@pytest.mark.parametrize("extension", ["bin", "pt", "pth", "ckpt"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_pickles_of_tensors(tmp_path, extension, wrapper):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(a.copy()) for name, a in TENSORS.items() if name != "bfloat16"}
    tensors["bfloat16"] = torch.tensor(TENSORS["bfloat16"].astype(np.float32)).bfloat16()
    path = tmp_path / f"a.{extension}"
    torch.save(tensors if wrapper is None else {wrapper: tensors, "epoch": 3}, path)
    assert_same(read_tensors(path), TENSORS)


def test_msgpack_names_are_joined_by_dots(tmp_path):
    from flax.serialization import msgpack_serialize

    array = TENSORS["bfloat16"]
    (tmp_path / "a.msgpack").write_bytes(msgpack_serialize({"blocks_0": {"norm": {"scale": array}}, "bias": array}))
    assert_same(read_tensors(tmp_path / "a.msgpack"), {"blocks_0.norm.scale": array, "bias": array})


class TouchesMarker:
    """Unpickled without care, runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, protocol, container):
    torch = pytest.importorskip("torch")
    marker, path = tmp_path / "marker", tmp_path / "evil.bin"
    content = {"weight": torch.ones(2), "trap": TouchesMarker(marker)}
    if container == "torch":
        torch.save(content, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(content["trap"], protocol=protocol))
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        read_tensors(path)
    assert not marker.exists()
    os.system(f"touch {marker}")
    assert marker.exists(), "the trap itself has to work for this test to mean anything"


def test_a_refused_pickle_is_not_recommended_to_be_trusted(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"trap": TouchesMarker(tmp_path / "marker")}, tmp_path / "evil.bin")
    with pytest.raises(WeightsError, match=r"refused.*posix\.system.*safetensors") as error:
        read_tensors(tmp_path / "evil.bin")
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("extension", ["safetensors", "bin", "msgpack"])
def test_files_cut_anywhere_are_refused(tmp_path, extension):
    torch = pytest.importorskip("torch")
    from flax.serialization import msgpack_serialize

    whole, cut = tmp_path / f"whole.{extension}", tmp_path / f"cut.{extension}"
    arrays = {"a": np.ones((4, 5), np.float32), "b": np.zeros(30, np.float32)}
    if extension == "safetensors":
        write_safetensors(whole, arrays)
    elif extension == "bin":
        torch.save({name: torch.tensor(array) for name, array in arrays.items()}, whole)
    else:
        whole.write_bytes(msgpack_serialize(arrays))
    data = whole.read_bytes()
    for size in {0, 1, 7, 8, 9, *range(10, len(data), max(1, len(data) // 40)), len(data) - 1}:
        cut.write_bytes(data[:size])
        with pytest.raises(WeightsError, match=re.escape(str(cut))):
            read_tensors(cut)


@pytest.mark.parametrize("extension", ["safetensors", "bin", "msgpack"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "looks like a Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "looks like a web page"),
        (b"\n<html lang=en>", "looks like a web page"),
        (b'{"error":"Repository not found"}', "server's error message"),
        (b"some text that is nothing in particular", "not a"),
    ],
)
def test_what_commonly_lies_where_weights_should(tmp_path, extension, content, reason):
    path = tmp_path / f"model.{extension}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(str(path)) + f".*{reason}"):
        read_tensors(path)


def test_absent_files_and_unknown_extensions(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.bin"):
        read_tensors(tmp_path / "gone.bin")
    (tmp_path / "model.h5").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"model\.h5.*\.safetensors, \.msgpack, \.bin"):
        read_tensors(tmp_path / "model.h5")


def test_entries_that_are_no_tensors_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.ones(2), "steps": 3}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a\.pt.*steps"):
        read_tensors(tmp_path / "a.pt")


def test_an_unknown_dtype_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(WeightsError, match=r"a\.safetensors.*F8_E8M0"):
        read_tensors(tmp_path / "a.safetensors")


def test_arrays_can_be_changed_without_changing_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.ones(3, np.float32)})
    read_tensors(path)["a"][:] = 7
    assert read_tensors(path)["a"].tolist() == [1, 1, 1]


WRITE_TOO_MUCH = """
import resource, signal, sys
import numpy as np
from imagereward_jax.storage.errors import WriteError
from imagereward_jax.weights.files import write_safetensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_safetensors(sys.argv[1], {"a": np.ones(1_000_000, np.float32)})
except WriteError as error:
    print(error)
"""


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.arange(3)})
    command = [sys.executable, "-c", WRITE_TOO_MUCH, str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert str(path) in output and "File too large" in output
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert read_tensors(path)["a"].tolist() == [0, 1, 2]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mount.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(small_disk):
    path = small_disk / "a.safetensors"
    write_safetensors(path, {"a": np.arange(3)})
    with pytest.raises(WriteError, match=r"a\.safetensors.*No space left"):
        write_safetensors(path, {"a": np.ones(1_000_000, np.float32)})
    assert os.listdir(small_disk) == ["a.safetensors"]
    assert read_tensors(path)["a"].tolist() == [0, 1, 2]


def test_writing_into_an_absent_folder_names_it(tmp_path):
    with pytest.raises(WriteError, match=r"absent/a\.safetensors"):
        write_safetensors(tmp_path / "absent" / "a.safetensors", {"a": np.ones(1)})


def test_broken_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1,')
    with pytest.raises(WeightsError, match=r"config\.json: not valid JSON"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(WeightsError, match=r"config\.json: expected a JSON object, found a list"):
        read_json(tmp_path / "config.json")


def test_a_cast_that_overflows_is_refused():
    tensors = {"small": np.ones(2, np.float32), "large": np.array([1e6], np.float32), "ids": np.arange(3)}
    with pytest.raises(WeightsError, match="vae: large overflows in float16"):
        cast(tensors, np.float16, what="vae")
    result = cast(tensors, ml_dtypes.bfloat16, what="vae")
    assert [array.dtype for array in result.values()] == [ml_dtypes.bfloat16, ml_dtypes.bfloat16, np.int64]


def test_saved_files_may_be_read_by_whom_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(2, np.float32)})
    finally:
        os.umask(old)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def torch_tensors():
    import torch

    plain = torch.arange(6.0)
    return {
        "sparse": (plain.to_sparse(), "a is a sparse_coo tensor"),
        "meta": (plain.to("meta"), "a is a meta tensor"),
        "quantised": (torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8), "a is a quantised tensor"),
        "complex": (plain.to(torch.complex64), "a has dtype torch.complex64, which is not read"),
        "expanded": (torch.zeros(1).expand(2**26), "refused: a unpacks 4 bytes to 256 MiB"),
    }


@pytest.mark.parametrize("kind", ["sparse", "meta", "quantised", "complex", "expanded"])
def test_tensors_that_are_not_plain_numbers_are_named(kind, tmp_path):
    torch = pytest.importorskip("torch")
    tensor, message = torch_tensors()[kind]
    torch.save({"a": tensor}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path / "a.pt")) + ".*" + message):
        read_tensors(tmp_path / "a.pt")


def test_tensors_without_names_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({1: torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a.pt: its tensors should have names; one is called 1"):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bit_floats_are_read_as_they_are(name, tmp_path):
    """The numbers of PyTorch's own conversion to float32, exactly."""
    torch = pytest.importorskip("torch")
    tensor = torch.randn(50).to(getattr(torch, name))
    torch.save({"a": tensor}, tmp_path / "a.pt")
    np.testing.assert_array_equal(read_tensors(tmp_path / "a.pt")["a"].astype(np.float32), tensor.float().numpy())


def test_an_archive_that_unpacks_to_far_more_is_refused_unread(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**26))
    with pytest.raises(WeightsError, match=r"a.pt: refused: 0.1 MiB that unpack to 64"):
        read_tensors(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', '{"a": ' + "9" * 5000 + "}", "\xff"])
def test_json_that_no_reader_should_take_names_its_file(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=r"config\.json: not valid JSON"):
        read_json(tmp_path / "config.json")
