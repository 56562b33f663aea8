"""The converter on damaged checkpoints and configs: arrays of the shapes that it says, or one sentence."""

import json
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
from write_sharded import pack_array, write_arrays

from vmoe.convert.arrays import CheckpointError, in_memory
from vmoe.convert.orbax import find_orbax, open_orbax
from vmoe.convert.reference_models import plan
from vmoe.convert.section import ConfigError
from vmoe.convert.sharded import open_sharded
from vmoe.convert.to_safetensors import convert_checkpoint, resolve_config

from .bounds import NASTY, damaged, damaged_tree, fuzz, outcome

GOLDEN = Path(__file__).parents[1] / "golden"
ARRAYS = {
    "b/10": np.arange(35, dtype=np.float32).reshape(7, 5),
    "b/2": np.float32(3.5).reshape(()),
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
}
PIECES = (
    *(b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 70),
    *(b"\xcf" + b"\xff" * 8, b"\xd3" + b"\xff" * 8, b"\xcb\x7f\xf0" + b"\0" * 6),
    *(b"\xc9\0\0\0\x01\x08\x90", b"\xd4\x01\xc0"),
    *(b"\xc7\x09\x08\x93\xc4\x01\x90\x90\x90", b"\x9f", b"\x8f", b"\xa1\xff", b"\xc1", b"\xc0", b"\xd4\x63\x01"),
)


def read_all(arrays) -> None:
    for array in arrays.values():
        size = int(np.prod(array.shape))
        if size < 1e6:
            array.read(np.complex128)


def any_damage_to_shards(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.getbasetemp() / "shards"
    folder.mkdir(exist_ok=True)
    write_arrays(folder / "c", ARRAYS, rows=2, num_shards=1)
    for name in data.draw(st.sampled_from([["index"], ["data-00000-of-00001"], ["index", "data-00000-of-00001"]])):
        file = folder / f"c.{name}"
        file.write_bytes(data.draw(damaged(file.read_bytes(), PIECES)))
    outcome(lambda: read_all(open_sharded(folder / "c")), (CheckpointError,))


test_any_damage_to_shards, test_much_damage_to_shards = fuzz(any_damage_to_shards, few=30, many=3000)


def packed_objects():
    """MessagePack objects, of which some are not what they say."""
    sizes = st.lists(st.integers(-1, 5) | st.sampled_from(NASTY[4:13:3]), max_size=3) | st.sampled_from(
        [[1] * 40, [2**62] * 3]
    )
    sizes = sizes.filter(lambda list_: all(not isinstance(one, int) or -(2**63) <= one < 2**64 for one in list_))
    dtypes = st.sampled_from(["float32", "bfloat16", "complex128", "object", "V8", "", "int8"])
    arrays = st.builds(
        lambda shape, dtype, data, code: msgpack.ExtType(code, msgpack.packb((shape, dtype, data))),
        sizes, dtypes, st.binary(max_size=24), st.sampled_from([1, 1, 3]),
    )  # fmt: skip
    raw = st.builds(msgpack.ExtType, st.integers(0, 9), st.binary(max_size=12))
    leaves = (
        arrays | raw | st.none() | st.booleans() | st.integers(-5, 2**40) | st.text(max_size=5) | st.binary(max_size=5)
    )
    leaves |= st.just(pack_array(ARRAYS["a"]))
    keys = st.sampled_from(["a", "b", "0", "index", "shard_count", "params", "k" * 300])
    return st.recursive(
        leaves,
        lambda inner: st.dictionaries(keys, inner, max_size=3) | st.lists(inner, max_size=3),
        max_leaves=8,
    )


def any_index(tmp_path_factory, data) -> None:
    file = tmp_path_factory.getbasetemp() / "any.index"
    file.write_bytes(msgpack.packb(data.draw(packed_objects())))
    outcome(lambda: read_all(open_sharded(file.with_suffix(""))), (CheckpointError,))


test_any_index, test_many_indices = fuzz(any_index, few=40, many=3000)


@pytest.fixture(scope="module")
def golden_config() -> tuple[dict, dict]:
    with np.load(GOLDEN / "vmoe_k2_vanilla.npz") as file:
        shapes = {key.removeprefix("params/"): file[key] for key in file if key.startswith("params/")}
    return json.loads((GOLDEN / "vmoe_k2_vanilla.json").read_text()), shapes


def any_model_config(golden_config, data) -> None:
    config, arrays = golden_config
    config = data.draw(damaged_tree(config))
    stored = {name: in_memory(array) for name, array in arrays.items()}

    def convert() -> None:
        resolved, _ = resolve_config(config)
        plan(resolved, stored, "checkpoint")

    outcome(convert, (ConfigError, CheckpointError))


test_any_model_config, test_many_model_configs = fuzz(any_model_config, few=20, many=2000)


def any_config_file(tmp_path_factory, data) -> None:
    file = tmp_path_factory.getbasetemp() / "config.json"
    content = (GOLDEN / "vmoe_k2_vanilla.json").read_bytes()
    pieces = (b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"NaN", b"-Infinity", b'"\\ud800"', b"\xff", b"\0", b"//")
    file.write_bytes(data.draw(damaged(content, pieces)))
    outcome(lambda: resolve_config(file), (ValueError,))


test_any_config_file, test_many_config_files = fuzz(any_config_file, few=20, many=2000)


@pytest.fixture(scope="module")
def zarr_folders(tmp_path_factory) -> list[Path]:
    """A small checkpoint as folders of Zarr arrays and as one OCDBT store."""
    ts = pytest.importorskip("tensorstore")
    folders = []
    for name in ("plain", "ocdbt"):
        folder = tmp_path_factory.mktemp(name)
        for key in ("params.x", "params.y"):
            store = {"driver": "file", "path": f"{folder}/"}
            store = (
                store | {"path": f"{folder}/{key}/"}
                if name == "plain"
                else {"driver": "ocdbt", "base": store, "path": key}
            )
            layout = {"shape": [4, 2], "chunks": [2, 2], "dtype": "<f4", "compressor": {"id": "zlib", "level": 1}}
            array = ts.open({"driver": "zarr", "kvstore": store, "metadata": layout}, create=True).result()
            array.write(np.arange(8, dtype=np.float32).reshape(4, 2)).result()
        tree = {"tree_metadata": {key: {
            "key_metadata": [{"key": part, "key_type": 2} for part in key.split(".")],
            "value_metadata": {"value_type": "jax.Array"},
        } for key in ("params.x", "params.y")}}  # fmt: skip
        (folder / "_METADATA").write_text(json.dumps(tree))
        folders.append(folder)
    return folders


def any_damage_to_orbax(zarr_folders, data) -> None:
    folder = data.draw(st.sampled_from(zarr_folders))
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    content = file.read_bytes()
    pieces = (b"[" * 50, b"99999999999", b"-1", b'"', b"null", b'"<f8"', b'"|O"', b'"blosc"', b"\xff" * 4, b"..", b"0")
    file.write_bytes(data.draw(damaged(content, pieces)))
    try:
        outcome(lambda: read_all(open_orbax(find_orbax(folder) or folder)), (CheckpointError,), megabytes=None)
    finally:
        file.write_bytes(content)


test_any_damage_to_orbax, test_much_damage_to_orbax = fuzz(any_damage_to_orbax, few=20, many=3000)


def test_undamaged_orbax_is_read(zarr_folders):
    for folder in zarr_folders:
        assert sorted(open_orbax(folder)) == ["params/x", "params/y"]
        read_all(open_orbax(folder))


def test_a_refused_checkpoint_leaves_no_file(tmp_path):
    write_arrays(tmp_path / "c", {"Encoder/encoder_norm/scale": ARRAYS["a"]})
    with pytest.raises(CheckpointError, match="does not fit the config"):
        convert_checkpoint(tmp_path / "c", GOLDEN / "vmoe_k2_vanilla.json", tmp_path / "out" / "model.safetensors")
    assert not (tmp_path / "out").exists()
