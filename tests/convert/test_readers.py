"""The sharded format and Orbax's, and what is wrong with damaged ones."""

import shutil
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest

from tests.convert.golden import GOLDEN, load, part
from tests.convert.write_sharded import MAGIC, pack_array, write_arrays
from vmoe.convert.arrays import CheckpointError
from vmoe.convert.messagepack import read_tree
from vmoe.convert.orbax import open_orbax
from vmoe.convert.sharded import find_sharded, open_sharded
from vmoe.convert.to_safetensors import open_checkpoint

ARRAYS = {
    "b/10": np.arange(35, dtype=np.float32).reshape(7, 5),
    "b/2": np.float32(3.5).reshape(()),
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b/empty": np.zeros((0, 4), np.float32),
    "b/flat": np.zeros((4, 0), np.float32),
}


def equal(read, wanted) -> bool:
    return read.keys() == wanted.keys() and all(np.array_equal(read[k].read(), wanted[k]) for k in wanted)


@pytest.mark.parametrize("version", ["20220622", None])
@pytest.mark.parametrize(("rows", "piece"), [(None, None), (2, None), (3, 4), (1, 1)])
def test_sharded(tmp_path, version, rows, piece):
    write_arrays(tmp_path / "c", ARRAYS, rows=rows, numbers_per_piece=piece, version=version, num_shards=2)
    assert equal(open_sharded(tmp_path / "c"), ARRAYS)


def test_bfloat16(tmp_path):
    numbers = np.array([[1.0, -2.5], [0.0, 3.0e38]], np.float32)
    write_arrays(tmp_path / "c", {"x": (numbers.view(np.uint32) >> 16).astype(np.uint16)}, dtype="bfloat16")
    array = open_sharded(tmp_path / "c")["x"]
    assert array.dtype == "bfloat16"
    assert array.nbytes == 8
    np.testing.assert_allclose(array.read(), numbers, rtol=1e-2)


def test_golden_checkpoints_hold_equal_tensors():
    wanted = part(load("vmoe_k2_vanilla")[1], "params/")
    for source in ("vmoe_checkpoint/vmoe_tiny", "vmoe_checkpoint_orbax"):
        pytest.importorskip("tensorstore") if "orbax" in source else None
        arrays = open_checkpoint(GOLDEN / source)[2]
        own = {k.removeprefix("params/"): v for k, v in arrays.items() if k != "step"}
        assert equal(own, wanted)


def test_files_of_other_kinds_and_none(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at .*nothing: there is nothing of that name; give"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "file.npz").touch()
    with pytest.raises(CheckpointError, match="no checkpoint at .*file.npz: it is a file of another format; give the"):
        open_checkpoint(tmp_path / "file.npz")


def test_last_step_or_the_one_asked_for(tmp_path):
    for step in (5, 10):
        write_arrays(tmp_path / f"ckpt_{step}", ARRAYS)
    assert find_sharded(tmp_path / "ckpt") == str(tmp_path / "ckpt_10")
    assert find_sharded(tmp_path / "ckpt", 5) == str(tmp_path / "ckpt_5")
    assert find_sharded(tmp_path / "ckpt", 7) is None
    assert find_sharded(tmp_path / "ckpt_5.index") == str(tmp_path / "ckpt_5")
    assert find_sharded(tmp_path) == str(tmp_path / "ckpt_10")
    assert find_sharded(tmp_path, 5) == str(tmp_path / "ckpt_5")
    write_arrays(tmp_path / "other_3", ARRAYS)
    assert find_sharded(tmp_path) is None  # which of the two?
    assert find_sharded(tmp_path / "other") == str(tmp_path / "other_3")
    assert find_sharded(GOLDEN / "vmoe_checkpoint") == str(GOLDEN / "vmoe_checkpoint" / "vmoe_tiny")


# --- damage ----------------------------------------------------------------------------------------------------------

SHARD = "c.data-00001-of-00003"


@pytest.fixture
def checkpoint(tmp_path):
    write_arrays(tmp_path / "c", ARRAYS, rows=1)
    return tmp_path / "c"


def edit(file, change):
    content = msgpack.unpackb(file.read_bytes())
    change(content)
    file.write_bytes(msgpack.packb(content))


def edit_shard(change):
    return lambda folder: edit(folder / SHARD, change)


def cut_inside_a_tensor(folder):
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: data.index(b"float32") + 12])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing: c.index says that it holds part of a$"),
        (cut_inside_a_tensor, rf"{SHARD} is truncated \(in a\)"),
        (
            edit_shard(lambda shard: shard["1"][0].__setitem__(0, [msgpack.ExtType(77, b"abc")])),
            rf"{SHARD} is damaged: its extension type 77 is not known \(in b/10\)",
        ),
        (
            edit_shard(lambda shard: shard["1"].pop(0)),
            r"the 6 of 7 chunks in the shards of .*c.index do not cover b/10, \(7, 5\), exactly once",
        ),
        (edit_shard(lambda shard: shard["1"].append(shard["1"][0])), "the 8 of 7 chunks .* b/10, .* exactly once"),
        (
            edit_shard(lambda shard: shard["1"][0].__setitem__(0, [pack_array(np.zeros(3, np.float32))])),
            rf"{SHARD} is damaged: 3 numbers of type float32 for the chunk at .*, which has 5 .*\(in b/10\)",
        ),
    ],
)
def test_damage_names_the_file_and_the_tensor(checkpoint, damage, message):
    damage(checkpoint.parent)
    with pytest.raises(CheckpointError, match=message):
        open_sharded(checkpoint)


def test_truncated_shard(checkpoint):
    file = checkpoint.parent / SHARD
    content = file.read_bytes()
    for keep in (0, 1, 40, 100, 200, -1):
        file.write_bytes(content[:keep])
        with pytest.raises(CheckpointError, match=f"{SHARD} is truncated"):
            open_sharded(checkpoint)


def test_chunks_that_overlap_where_others_lack(tmp_path):
    # 2 x 4 numbers in chunks that together have 8, as [0:2, 0:3] and [0:1, 2:4]; [1:2, 3:4] is left out.
    chunks = [[(0, 2), (0, 3)], [(0, 1), (2, 4)]]
    slices = [msgpack.packb([msgpack.packb((*side, None)) for side in chunk]) for chunk in chunks]
    entry = msgpack.ExtType(8, msgpack.packb((msgpack.packb(((2, 4), "float32", False, {})), slices, [0, 0])))
    index = {"shard_count": 1, "index": {"a": entry}, "version": "20220622"}
    (tmp_path / "c.index").write_bytes(msgpack.packb(index))
    chunks = [
        [[pack_array(np.zeros(size, np.float32))], msgpack.ExtType(6, where)]
        for size, where in zip((6, 2), slices, strict=True)
    ]
    (tmp_path / "c.data-00000-of-00001").write_bytes(msgpack.packb({MAGIC: True, "0": chunks}))
    with pytest.raises(CheckpointError, match="2 of 2 chunks .* do not cover a, .* exactly once"):
        open_sharded(tmp_path / "c")


def test_many_chunks_open_quickly(tmp_path):
    array = np.arange(4000, dtype=np.float32).reshape(2000, 2)
    write_arrays(tmp_path / "c", {"a": array}, rows=1, num_shards=2)
    start = time.process_time()
    arrays = open_sharded(tmp_path / "c")
    assert time.process_time() - start < 1
    assert equal(arrays, {"a": array})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(version="20991231"), "has version '20991231'"),
        (lambda index: index.update(shard_count="3"), "shard_count of '3'"),
        (lambda index: index.update(shard_count=1), "puts a into shards"),
        (lambda index: index.update(index=3), "no tree named 'index'"),
        (lambda index: index["index"].update(a=3), "describes a by int"),
        (lambda index: index["index"].update(a=msgpack.ExtType(8, b"\x93\xc4\x01")), r"damaged: .*\(in index/a\)"),
        (lambda index: index["index"].update(a=msgpack.ExtType(8, msgpack.packb([1, 2, 3]))), "damaged"),
        (lambda index: index["index"].pop("b"), "of which the index knows nothing"),
    ],
)
def test_damaged_index(checkpoint, change, message):
    edit(Path(f"{checkpoint}.index"), change)
    with pytest.raises(CheckpointError, match=message):
        open_sharded(checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x91" * 2000 + b"\x01", "maximum recursion depth"),
        (b"\x81\xa1a" * 2000 + b"\x01", "has more than 500 characters"),
        (b"\x81\xa0" * 2000 + b"\x01", "maximum recursion depth"),
        (b"\xdd\xff\xff\xff\xff", "holds more than 262144 objects"),
        (b"\xdf\xff\xff\xff\xff", "holds more than 262144 objects"),
        (b"\xdb\xff\xff\xff\xff", "4294967295 exceeds max_str_len|is truncated"),
        (b"\xc6\xff\xff\xff\xff", "is truncated"),
        (b"\xc1", "is damaged: FormatError"),
        (b"\x80\x01", "there is more behind the end"),
        (b"\x81\xc0\x01", "neither text nor a number"),
        (b"\xa1\xff", "'utf-8' codec can't decode"),
        (b"\xc7\x0a\x01\x93\x91\x01\xa5int32\xc0", "has other than 4 bytes|shape, type and numbers"),
    ],
)
def test_hostile_files(tmp_path, content, message):
    file = tmp_path / "x"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x is .*{message}|x .*{message}"):
        read_tree(file)


# --- Orbax -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def orbax(tmp_path):
    pytest.importorskip("tensorstore")
    return Path(shutil.copytree(GOLDEN / "vmoe_checkpoint_orbax", tmp_path / "orbax"))


def steps_of(orbax, *names):
    """A folder with copies of a checkpoint under these names; those that end with "/" are empty folders."""
    run = orbax.parent / "run"
    for name in names:
        if name.endswith("/"):
            (run / name).mkdir(parents=True)
        else:
            shutil.copytree(orbax, run / name)
    return run


@pytest.mark.parametrize(
    ("names", "newest", "warning"),
    [
        (["9", "10", "20/"], "10", "run holds no arrays in 20: 10 is read"),
        (["9", "10", "20/default/", "30/"], "10", "run holds no arrays in 20, 30: 10 is read"),
        (["checkpoint_2", "checkpoint_10"], "checkpoint_10", ""),
        (["checkpoint_2", "checkpoint_10/"], "checkpoint_2", "run holds no arrays in checkpoint_10: checkpoint_2 is"),
        (["step-3/default", "step-20/default", "metrics/"], "default", ""),
        (["5", "7.orbax-checkpoint-tmp-1234"], "5", ""),
        (["params_1", "opt_2/"], "params_1", "run holds no arrays in opt_2: params_1 is read"),
    ],
)
def test_the_newest_whole_step_of_a_folder(orbax, caplog, names, newest, warning):
    path, kind, arrays = open_checkpoint(steps_of(orbax, *names))
    assert (Path(path).name, kind, len(arrays)) == (newest, "orbax", 75)
    assert warning in caplog.text
    assert bool(caplog.text) == bool(warning)


@pytest.mark.parametrize(
    ("names", "step", "message"),
    [
        (["10", "20/"], 20, "run holds no arrays in 20, saves that never ended: give another"),
        (["10", "20/"], 30, "no checkpoint of step 30 at .*run: the folder holds 10, 20; give"),
        (["1/", "2/"], None, "run holds no arrays in 1, 2, saves that never ended: give another"),
        (["a_1", "b_2"], None, "run holds several checkpoints, a_1, b_2: give the path of one"),
        (["a_1", "b_1"], 1, "run holds several checkpoints, a_1, b_1: give the path of one"),
        (["params", "state"], None, "run holds several checkpoints, params, state: give the path of one"),
        (["10/params", "10/state"], None, "10 holds several checkpoints, params, state: give the path of one"),
        (["logs/", "figures/"], None, "no checkpoint at .*run: the folder holds figures, logs; give"),
    ],
)
def test_folders_without_one_checkpoint_say_what_they_hold(orbax, names, step, message):
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(steps_of(orbax, *names), step)
    assert "\n" not in str(error.value)


def test_folders_without_one_sharded_checkpoint_say_what_they_hold(tmp_path):
    with pytest.raises(CheckpointError, match="the folder holds nothing; give the PREFIX of PREFIX.index"):
        open_checkpoint(tmp_path)
    for prefix in ("a_1", "b_2"):
        write_arrays(tmp_path / prefix, ARRAYS)
    with pytest.raises(
        CheckpointError, match=r"the folder holds a_1.data.*, a_1.index, .* and \d+ more; give the PREFIX"
    ):
        open_checkpoint(tmp_path)


def read_all(folder):
    for array in open_orbax(folder).values():
        array.read()


def test_truncated_and_lost_data_files_of_orbax(orbax):
    files = list((orbax / "ocdbt.process_0" / "d").iterdir())
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged|cannot be opened|not a readable"):
        read_all(orbax)
    for file in files:
        file.unlink()
    with pytest.raises(CheckpointError, match="Encoder|not a readable Orbax"):
        read_all(orbax)


def test_plain_zarr_with_a_lost_chunk(tmp_path):
    ts = pytest.importorskip("tensorstore")
    folder = tmp_path / "params.x"
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {"shape": [4, 2], "chunks": [2, 2], "dtype": "<f4"},
    }
    ts.open(spec, create=True).result().write(np.arange(8, dtype=np.float32).reshape(4, 2)).result()
    (tmp_path / "checkpoint").touch()
    assert equal(open_orbax(tmp_path), {"params/x": np.arange(8, dtype=np.float32).reshape(4, 2)})
    (folder / "1.0").unlink()
    with pytest.raises(CheckpointError, match="params/x in .* has lost 1 of its 2 chunks"):
        open_orbax(tmp_path)


def test_without_tensorstore(orbax, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[convert\]'"):
        open_orbax(orbax)
