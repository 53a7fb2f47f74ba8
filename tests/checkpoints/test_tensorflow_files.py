"""Models and other checkpoints that TensorFlow itself wrote, in each form that it has."""

import os
import shutil

import numpy as np
import pytest
from helpers import MODELS

import utils
from checkpoints import openai
from checkpoints.tensorflow import read_checkpoint, read_index, verify_checkpoint
from utils import load_encoder_hparams_and_params

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed; it has no wheel for this Python yet")
NANO = os.path.join(MODELS, "nano")


@pytest.fixture(scope="module")
def nano_variables():
    return read_checkpoint(os.path.join(NANO, openai.CHECKPOINT))


@pytest.fixture
def prefix(tmp_path):
    """Where a model's checkpoint goes: the other files of nano are there."""
    shutil.copytree(NANO, tmp_path / "written", ignore=shutil.ignore_patterns("model.ckpt*"))
    return str(tmp_path / "written" / openai.CHECKPOINT)


def assert_nano(prefix, nano_variables):
    """The loader gives nano's weights, bit by bit, and verifying finds nothing."""
    folder = os.path.dirname(prefix)
    _, hparams, params = load_encoder_hparams_and_params("written", os.path.dirname(folder))
    _, expected, weights = load_encoder_hparams_and_params("nano", MODELS)
    assert hparams == expected
    for block, nano_block in zip([params, *params["blocks"]], [weights, *weights["blocks"]], strict=True):
        assert block.keys() == nano_block.keys()
    assert params["wte"].tobytes() == weights["wte"].tobytes()
    arrays = read_checkpoint(prefix)
    for name, array in nano_variables.items():
        assert arrays[name].dtype == np.float32 and arrays[name].tobytes() == array.tobytes()
    assert utils.find_problems("written", os.path.dirname(folder)) == []


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "a shard a device"])
def test_variables_in_slices_and_files_in_shards_are_loaded(prefix, nano_variables, sharded):
    v1 = tf.compat.v1
    with tf.Graph().as_default():
        fed, partitioner = {}, v1.fixed_size_partitioner(3)
        for i, (name, array) in enumerate(nano_variables.items()):
            parts = partitioner if name in ("model/wte", "model/wpe") else None
            with tf.device(f"/cpu:{i % 2}"):
                variable = v1.get_variable(name, array.shape, use_resource=False, partitioner=parts)
            values = np.split(array, np.cumsum([part.shape[0] for part in variable])[:-1]) if parts else [array]
            fed |= dict(zip(variable if parts else [variable], values, strict=True))
        with v1.Session(config=v1.ConfigProto(device_count={"CPU": 2})) as session:
            for variable, value in fed.items():
                variable.load(value, session)
            v1.train.Saver(sharded=sharded).save(session, prefix, write_meta_graph=False, write_state=False)
    n_shards, _, entries = read_index(prefix + ".index")
    assert n_shards == 1 + sharded and entries["model/wte"].slices and len(entries) == len(nano_variables) + 6
    assert_nano(prefix, nano_variables)


def save(prefix, tensors):
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=[tf.constant(tensor) if isinstance(tensor, np.ndarray) else tensor for tensor in tensors.values()],
    )


def test_extra_variables_of_every_kind_do_no_harm(prefix, nano_variables):
    """Counters, an optimizer's moments, complex and quantised numbers: none of it is the model's."""
    extras = {"a/empty": tf.zeros([0, 3]), "z/empty": tf.zeros([2, 0], tf.int8), "no/strings": tf.zeros([0], tf.string)}
    extras["extra/float8"] = tf.cast(tf.zeros([3]), tf.dtypes.experimental.float8_e5m2)
    extras["extra/int4"] = tf.cast(tf.zeros([3], tf.int8), tf.dtypes.experimental.int4)
    for dtype in (tf.complex64, tf.complex128, tf.float16, tf.bfloat16, tf.float64, tf.int64, tf.bool):
        extras[f"extra/{dtype.name}"] = tf.cast([0.1, 1.0, 3e4], dtype)
    for dtype in (tf.qint8, tf.quint8, tf.qint16, tf.quint16, tf.qint32):
        stored = {1: tf.int8, 2: tf.int16, 4: tf.int32}[dtype.size]
        extras[f"extra/{dtype.name}"] = tf.bitcast(tf.constant([0, 1, -3], stored), dtype)
    save(prefix, nano_variables | extras)
    assert_nano(prefix, nano_variables)
    arrays = read_checkpoint(prefix)
    assert arrays.keys() == nano_variables.keys() | extras.keys() - {"no/strings"}
    for name in extras.keys() - {"no/strings", "extra/float8", "extra/int4"}:  # NumPy has none of these
        expected = tf.train.load_checkpoint(prefix).get_tensor(name)
        is_float = extras[name].dtype.is_floating
        assert arrays[name].dtype == (np.float32 if is_float else expected.dtype)
        np.testing.assert_array_equal(arrays[name], expected.astype(arrays[name].dtype))


def test_an_empty_variable_can_be_mapped(prefix, nano_variables):
    save(prefix, nano_variables | {"a/empty": tf.zeros([0, 3]), "z/empty": tf.zeros([2, 0])})
    assert_nano(prefix, nano_variables)
    arrays = read_checkpoint(prefix)
    assert arrays["a/empty"].shape == (0, 3) and not arrays["model/wte"].flags.owndata


def test_checkpoints_of_objects_are_read(tmp_path):
    """With a graph of the objects, which is a string, and the place in a data set, which is a variant."""
    objects = tf.train.Checkpoint(v=tf.Variable([1.0, 2.0]), it=iter(tf.data.Dataset.range(3)))
    prefix = objects.save(str(tmp_path / "ckpt"))
    arrays = read_checkpoint(prefix)
    assert arrays["v/.ATTRIBUTES/VARIABLE_VALUE"].tolist() == [1, 2]
    assert arrays["save_counter/.ATTRIBUTES/VARIABLE_VALUE"] == 1 and len(arrays) == 2
    verify_checkpoint(prefix)
