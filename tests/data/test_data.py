"""Data sets: archives, downloads, preparation, batches, and the scaling of pixels."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import os
import pathlib
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import urllib.request

import jax
import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from PIL import Image

from diffusion_jax.data import prepared
from diffusion_jax.data.batches import read_batches
from diffusion_jax.data.dataset import DatasetChoice, Records, Split
from diffusion_jax.data.load import describe_dataset, load_dataset
from diffusion_jax.data.pixels import to_uint8, to_x_0
from diffusion_jax.data.sources import DATASETS, archives, cifar10, idx, toy2d
from diffusion_jax.data.sources.source import VERSION
from diffusion_jax.errors import ConfigError

ARCHIVES = pathlib.Path(
    os.environ.get("DIFFUSION_JAX_ARCHIVES", pathlib.Path(__file__).parents[3] / "shared" / "data")
)
LEVELS = sorted({source.levels for source in DATASETS.values() if source.levels})

real = functools.partial(
    pytest.param, marks=pytest.mark.skipif(not ARCHIVES.is_dir(), reason="no real archives")
)


def choice_of(name, data_dir, archives=None, flip=False):
    archives = None if archives is None else str(archives)
    return DatasetChoice(name=name, archives=archives, data_dir=str(data_dir), flip=flip)


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    load_dataset(choice_of("digits", folder))
    return folder


def numbered(size, shape=(2, 3, 1)):
    """A split whose pixels and labels are the number of the example, for up to 256 examples."""
    labels = np.arange(size, dtype=np.int32)
    images = np.broadcast_to(labels.reshape(-1, 1, 1, 1), (size, *shape)).astype(np.uint8)
    return Split(images, labels)


def take(split, count, batch_size, seed=0, **kwargs):
    """The first ``count`` batches of a stream."""
    stream = read_batches(split, batch_size, seed, **kwargs)
    return [next(stream) for _ in range(count)]


def labels_of(batches):
    return np.concatenate([batch["label"] for batch in batches])


# The data sets of the package


@pytest.mark.parametrize("name", DATASETS)
def test_describe_needs_and_writes_nothing(name, tmp_path):
    info = describe_dataset(choice_of(name, tmp_path / "sets"))
    assert info.name == name
    assert info.num_classes >= 2
    assert (info.levels is None) == (len(info.shape) == 1)
    assert not list(tmp_path.iterdir())


def test_digits_are_those_of_scikit_learn(digits_dir):
    loaded = load_dataset(choice_of("digits", digits_dir))
    assert (len(loaded.train), len(loaded.test)) == (1497, 300)
    ours = np.concatenate([loaded.train.images, loaded.test.images])
    ours = np.column_stack([ours.reshape(1797, 64), *[[*loaded.train.labels, *loaded.test.labels]]])
    original = sklearn.datasets.load_digits()
    theirs = np.column_stack([original.data, original.target])
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.astype(int).tolist()))
    assert np.bincount(loaded.test.labels).tolist() == [30] * 10


def test_toy2d_is_its_mixture_of_gaussians(tmp_path):
    loaded = load_dataset(choice_of("toy2d", tmp_path))
    again = load_dataset(choice_of("toy2d", tmp_path))
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(loaded.train.images, again.train.images)
    train, test = (set(map(tuple, split.images.tolist())) for split in loaded[-2:])
    assert not train & test
    assert toy2d.WEIGHTS.sum() == pytest.approx(1)
    assert loaded.train.images.dtype == np.float32
    size = len(loaded.train)
    for k, (weight, mean, covariance) in enumerate(
        zip(toy2d.WEIGHTS, toy2d.MEANS, toy2d.COVARIANCES)
    ):
        points = loaded.train.images[loaded.train.labels == k]
        assert len(points) == pytest.approx(size * weight, abs=5 * np.sqrt(size * weight))
        # Whitened points are standard normal; allow five standard errors of mean and covariance
        white = np.linalg.solve(np.linalg.cholesky(covariance), (points - mean).T)
        bound = 5 / np.sqrt(len(points))
        np.testing.assert_allclose(white.mean(axis=1), 0, atol=bound)
        np.testing.assert_allclose(np.cov(white), np.eye(2), atol=np.sqrt(2) * bound)


@pytest.mark.parametrize("name", [real("mnist"), real("fashion_mnist")])
def test_real_archives_have_the_published_counts(name):
    splits = idx.read(name, ARCHIVES / name)
    for split, size in {"train": 60_000, "test": 10_000}.items():
        images, labels = splits[split]
        assert images.shape == (size, 28, 28, 1)
        assert labels.shape == (size,)
    images, labels = splits["train"]
    if name == "mnist":
        assert images.mean() == pytest.approx(33.3184, abs=1e-4)
        assert ((labels == 0).sum(), (labels == 9).sum()) == (5_923, 5_949)
    else:
        assert np.bincount(labels).tolist() == [6_000] * 10


@pytest.mark.slow
@pytest.mark.parametrize("name", [real("mnist")])
def test_real_archives_come_back_from_tfds_unchanged(name, tmp_path):
    loaded = load_dataset(choice_of(name, tmp_path, ARCHIVES / name))
    original = idx.read(name, ARCHIVES / name)
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(loaded, split).images, original[split][0])
        np.testing.assert_array_equal(getattr(loaded, split).labels, original[split][1])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (choice_of("mnits", "{}"), r"config\.dataset\.name = 'mnits'.*did you mean 'mnist'"),
        (choice_of("", "{}"), r"config\.dataset\.name = ''"),
        (choice_of("toy2d", "{}", flip=True), r"config\.dataset\.flip = True: toy2d"),
        (choice_of("mnist", "{}", "/no/such"), r"config\.dataset\.archives = '/no/such'"),
    ],
)
def test_describe_refuses(choice, message, tmp_path):
    choice = choice._replace(data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        describe_dataset(choice)
    assert not list(tmp_path.iterdir())


def test_a_data_dir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"config\.dataset\.data_dir = .*can be written"):
        load_dataset(choice_of("digits", tmp_path / "file" / "sets"))


# Archives


def idx_file(array):
    """The bytes of an IDX file."""
    return struct.pack(f">2xBB{array.ndim}i", 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder of four small IDX files whose checksums count as MNIST's, and their arrays."""
    random = np.random.default_rng(0)
    arrays = [
        random.integers(0, 256, (24, 28, 28), np.uint8),
        random.integers(0, 10, 24, np.uint8),
        random.integers(0, 256, (7, 28, 28), np.uint8),
        random.integers(0, 10, 7, np.uint8),
    ]
    folder = tmp_path / "archives"
    folder.mkdir()
    sums = []
    for name, array in zip(idx.FILES, arrays):
        (folder / name).write_bytes(gzip.compress(idx_file(array)))
        sums.append(hashlib.sha256(idx_file(array)).hexdigest())
    monkeypatch.setitem(idx.SUMS, "mnist", tuple(sums))
    return folder, arrays


@pytest.mark.parametrize("unpacked", [False, True])
def test_idx_archives_come_back_unchanged(unpacked, small_mnist, tmp_path):
    folder, arrays = small_mnist
    if unpacked:
        for path in list(folder.iterdir()):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    loaded = load_dataset(choice_of("mnist", tmp_path / "sets", folder))
    np.testing.assert_array_equal(loaded.train.images[..., 0], arrays[0])
    np.testing.assert_array_equal(loaded.train.labels, arrays[1])
    np.testing.assert_array_equal(loaded.test.images[..., 0], arrays[2])
    np.testing.assert_array_equal(loaded.test.labels, arrays[3])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap_content(path):
    path.write_bytes(gzip.compress(idx_file(np.zeros((24, 28, 28), np.uint8))))


def flip_bit_unpacked(path):
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    flip_bit(path.with_suffix(""))


@pytest.mark.parametrize("name", [idx.FILES[0], idx.FILES[2]])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pathlib.Path.unlink, "no {}.gz"),
        (truncate, "{}.gz is truncated"),
        (flip_bit, "{}.gz is damaged"),
        (swap_content, "{}.gz: wrong content"),
        (flip_bit_unpacked, "{}: wrong content"),
    ],
)
def test_a_bad_archive_is_named_and_nothing_written(name, damage, message, small_mnist, tmp_path):
    folder, _ = small_mnist
    damage(folder / name)
    with pytest.raises(ConfigError, match=message.format(name.removesuffix(".gz"))) as caught:
        load_dataset(choice_of("mnist", tmp_path / "sets", folder))
    assert str(caught.value).startswith(f"config.dataset.archives = '{folder}': ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sets").exists()


@pytest.mark.parametrize("name", [real("fashion_mnist")])
def test_archives_of_another_set_are_recognised(name, tmp_path):
    with pytest.raises(ConfigError, match=f"train-images.*that of {name}"):
        load_dataset(choice_of("mnist", tmp_path / "sets", ARCHIVES / name))


def test_kmnist_is_compared_with_the_sums_of_the_compressed_files(small_mnist, tmp_path):
    folder, _ = small_mnist
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte\.gz: wrong content"):
        load_dataset(choice_of("kmnist", tmp_path / "sets", folder))


@pytest.fixture
def small_cifar10(monkeypatch):
    """Six small batches in both formats whose checksums count as CIFAR-10's, and their arrays."""
    random = np.random.default_rng(0)
    files, binary, arrays = {}, {}, {}
    for name in [batch for batches in cifar10.BATCHES.values() for batch in batches]:
        pixels = random.integers(0, 256, (5, 3072), np.uint8)
        labels = random.integers(0, 10, 5)
        files[name] = pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=3)
        rows = np.column_stack([labels.astype(np.uint8), pixels])
        binary[f"{name}.bin"] = rows.tobytes()
        arrays[name] = pixels.reshape(-1, 3, 32, 32), labels
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(cifar10, "MD5", sums)
    return files, binary, arrays


def write_tar(path, folder, files, mode):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("form", ["tar.gz", "tar", "unpacked", "binary"])
def test_every_form_of_cifar10_is_read(form, small_cifar10, tmp_path, monkeypatch):
    files, binary, arrays = small_cifar10
    if form == "tar.gz":
        write_tar(tmp_path / cifar10.PYTHON, cifar10.PYTHON_FOLDER, files, "w:gz")
    elif form == "tar":
        write_tar(tmp_path / "cifar-10-python.tar", cifar10.PYTHON_FOLDER, files, "w")
    elif form == "unpacked":
        (tmp_path / cifar10.PYTHON_FOLDER).mkdir()
        for name, content in files.items():
            (tmp_path / cifar10.PYTHON_FOLDER / name).write_bytes(content)
    else:
        path = tmp_path / cifar10.BINARY
        write_tar(path, cifar10.BINARY_FOLDER, binary, "w:gz")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(cifar10, "BINARY_SHA256", sha256)
    splits = cifar10.read(tmp_path)
    images, labels = splits["train"]
    assert images.shape == (25, 32, 32, 3)
    planes, expected = arrays["data_batch_3"]
    for channel in range(3):  # red, green, blue
        np.testing.assert_array_equal(images[10:15, :, :, channel], planes[:, channel])
    np.testing.assert_array_equal(labels[10:15], expected)
    np.testing.assert_array_equal(splits["test"][1], arrays["test_batch"][1])


@pytest.mark.parametrize("damage", [truncate, flip_bit])
def test_a_bad_archive_of_cifar10_is_named(damage, small_cifar10, tmp_path):
    files, _, _ = small_cifar10
    write_tar(tmp_path / cifar10.PYTHON, cifar10.PYTHON_FOLDER, files, "w:gz")
    damage(tmp_path / cifar10.PYTHON)
    with pytest.raises(ConfigError, match=r"is (truncated|damaged)|_batch.*wrong content"):
        cifar10.read(tmp_path)


def test_a_bad_batch_of_cifar10_is_named(small_cifar10, tmp_path):
    files, _, _ = small_cifar10
    files["data_batch_2"] = files["data_batch_2"][:-1] + b"!"
    write_tar(tmp_path / cifar10.PYTHON, cifar10.PYTHON_FOLDER, files, "w:gz")
    with pytest.raises(ConfigError, match="data_batch_2: wrong content"):
        cifar10.read(tmp_path)


def test_pickles_of_cifar10_can_call_nothing(small_cifar10, tmp_path, monkeypatch):
    files, _, _ = small_cifar10
    files["data_batch_1"] = pickle.dumps(os.getcwd)
    sums = cifar10.MD5 | {"data_batch_1": hashlib.md5(files["data_batch_1"]).hexdigest()}
    monkeypatch.setattr(cifar10, "MD5", sums)
    write_tar(tmp_path / cifar10.PYTHON, cifar10.PYTHON_FOLDER, files, "w:gz")
    with pytest.raises(pickle.UnpicklingError, match="not allowed"):
        cifar10.read(tmp_path)


# Downloads


@pytest.fixture
def mnist_at(monkeypatch):
    """A function that makes another URL the source of MNIST's archives."""
    monkeypatch.setenv("no_proxy", "*")

    def move(url):
        source = DATASETS["mnist"]
        urls = tuple(f"{url}/{name}" for name in source.archives)
        monkeypatch.setitem(DATASETS, "mnist", source._replace(urls=urls))

    return move


@contextlib.contextmanager
def serve(folder):
    """An HTTP server of a folder on this machine; gives its URL."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_archives_are_downloaded(small_mnist, mnist_at, tmp_path):
    folder, arrays = small_mnist
    with serve(folder) as url:
        mnist_at(url)
        loaded = load_dataset(choice_of("mnist", tmp_path / "sets"))
    np.testing.assert_array_equal(loaded.train.images[..., 0], arrays[0])


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, truncate, swap_content])
def test_a_bad_download_is_named_and_nothing_written(damage, small_mnist, mnist_at, tmp_path):
    folder, _ = small_mnist
    damage(folder / idx.FILES[2])
    with serve(folder) as url:
        mnist_at(url)
        with pytest.raises(ConfigError, match=re.escape(idx.FILES[2])):
            load_dataset(choice_of("mnist", tmp_path / "sets"))
    assert not (tmp_path / "sets").exists()


def test_without_a_network_the_message_names_the_files_and_the_field(mnist_at, tmp_path):
    mnist_at("http://127.0.0.1:9")
    with pytest.raises(ConfigError) as caught:
        load_dataset(choice_of("mnist", tmp_path / "sets"))
    message = str(caught.value)
    assert all(name in message for name in ("--config.dataset.archives=", *idx.FILES))
    assert "\n" not in message
    assert not (tmp_path / "sets").exists()


def test_a_server_that_never_answers_is_an_error_after_a_timeout(mnist_at, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        mnist_at(f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ConfigError, match=r"no answer within 0\.3 s"):
            load_dataset(choice_of("mnist", tmp_path / "sets"))


def test_the_urls_can_be_parsed():
    for source in DATASETS.values():
        for url, name in zip(source.urls, source.archives):
            assert urllib.request.Request(url).host
            assert name.endswith(".gz")


# Preparing and decoding

LOAD = """
import sys
from diffusion_jax.data.batches import read_batches
from diffusion_jax.data.dataset import DatasetChoice
from diffusion_jax.data.load import load_dataset
assert "tensorflow_datasets" not in sys.modules and "grain" not in sys.modules
choice = DatasetChoice(name="digits", data_dir=sys.argv[1])
loaded = load_dataset(choice)
next(read_batches(loaded.train, 32, seed=0))
print(int(loaded.train.images.sum()))
"""

DIE = """
import os, signal
from diffusion_jax.data.sources import builder
generate = builder.ImageBuilder._generate_examples
def die(self, images, labels):
    yield from generate(self, images[:20], labels[:20])
    os.kill(os.getpid(), signal.SIGKILL)
builder.ImageBuilder._generate_examples = die
"""


@pytest.fixture
def start(tmp_path):
    """A function that starts a script with a fake tensorflow whose import fails."""
    fake = tmp_path / "packages" / "tensorflow"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise AssertionError('something imports tensorflow')")
    path = os.pathsep.join([str(fake.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}

    def run(script, *args):
        command = [sys.executable, "-c", script, *map(str, args)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)

    return run


def test_two_processes_may_start_at_once_and_neither_needs_tensorflow(start, tmp_path):
    processes = [start(LOAD, tmp_path / "sets") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    original = int(sklearn.datasets.load_digits().data.sum())
    test = int(load_dataset(choice_of("digits", tmp_path / "sets")).test.images.sum())
    assert [int(out) for out, _ in outputs] == [original - test] * 2
    log = "".join(err for _, err in outputs)
    assert log.count("preparing digits") == log.count("decoding digits") == 1


def test_preparing_that_was_killed_is_done_again(start, tmp_path):
    process = start(LOAD.replace("loaded =", f"{DIE}\nloaded ="), tmp_path)
    _, log = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, log
    assert list((tmp_path / "digits").glob("incomplete*"))
    assert len(load_dataset(choice_of("digits", tmp_path)).train) == 1497
    assert not list((tmp_path / "digits").glob("incomplete*"))


def test_decoded_arrays_are_kept_until_the_set_changes(digits_dir, tmp_path):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    choice = choice_of("digits", tmp_path)
    folder = tmp_path / "digits" / VERSION
    load_dataset(choice)
    (decoded,) = folder.glob("decod*")
    pixels = np.load(decoded / "train_images.npy")
    np.save(decoded / "train_images.npy", 16 - pixels)
    np.testing.assert_array_equal(load_dataset(choice).train.images, 16 - pixels)

    (folder / "decoding-1").mkdir()  # as a killed process leaves it
    os.utime(next(folder.glob("*-train.array_record*")), ns=(0, 0))
    np.testing.assert_array_equal(load_dataset(choice).train.images, pixels)
    (anew,) = folder.glob("decod*")
    assert anew != decoded


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_prepared_set_need_not_be_writable(digits_dir, tmp_path, capsys):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    folder = tmp_path / "digits" / VERSION
    shutil.rmtree(next(folder.glob("decoded-*")))
    folder.chmod(0o500)
    assert len(load_dataset(choice_of("digits", tmp_path)).train) == 1497
    assert "cannot be written" in capsys.readouterr().err


def test_a_set_too_large_for_the_memory_gives_the_same_batches(digits_dir, tmp_path, monkeypatch):
    choice = choice_of("digits", digits_dir)
    in_memory = load_dataset(choice).train
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    shutil.rmtree(next((tmp_path / "digits" / VERSION).glob("decoded-*")))
    monkeypatch.setattr(prepared, "MAX_BYTES_IN_MEMORY", 1000)
    on_disk = load_dataset(choice_of("digits", tmp_path)).train
    assert isinstance(on_disk.images, Records)
    assert not list((tmp_path / "digits" / VERSION).glob("decoded-*"))
    np.testing.assert_array_equal(on_disk.images[5], in_memory.images[5])
    np.testing.assert_array_equal(on_disk.images[3:9:2], in_memory.images[3:9:2])
    np.testing.assert_array_equal(on_disk.labels[-4:], in_memory.labels[-4:])
    for ours, theirs in zip(take(on_disk, 4, 50, flip=True), take(in_memory, 4, 50, flip=True)):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        np.testing.assert_array_equal(ours["label"], theirs["label"])


# Data sets that tfds prepared


class Stripes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.9.0")
    labelled = True
    splits = ("train", "validation")
    features = {"image": tfds.features.Image(shape=(4, 6, 3))}  # noqa: RUF012

    def _info(self):
        label = {"label": tfds.features.ClassLabel(num_classes=5)} if self.labelled else {}
        features = tfds.features.FeaturesDict(self.features | label)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in self.splits}

    def _generate_examples(self):
        for i in range(10):
            image = Image.fromarray(np.full((4, 6, 3), 20 * i, np.uint8))
            yield i, {"image": image} | ({"label": i % 5} if self.labelled else {})


def prepare(builder_class, data_dir):
    builder = builder_class(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def test_a_set_that_tfds_prepared_is_found_by_its_name(tmp_path):
    old = prepare(Stripes, tmp_path)
    loaded = load_dataset(choice_of("stripes", tmp_path))
    assert loaded[:4] == ("stripes", (4, 6, 3), 256, 5)
    np.testing.assert_array_equal(loaded.train.images[:, 0, 0, 0], 20 * np.arange(10))
    np.testing.assert_array_equal(loaded.test.labels, np.arange(10) % 5)

    shutil.copytree(old, old.with_name("1.10.0"))
    shutil.rmtree(next(old.with_name("1.10.0").glob("decoded-*")))
    load_dataset(choice_of("stripes", tmp_path))
    assert list(old.with_name("1.10.0").glob("decoded-*"))  # 1.10.0 is newer than 1.9.0
    load_dataset(choice_of("stripes:1.9.0", tmp_path))


def test_a_set_may_lack_labels_and_a_test_split(tmp_path):
    class Plain(Stripes, skip_registration=True):
        labelled = False
        splits = ("train",)

    prepare(Plain, tmp_path)
    for _ in range(2):  # decoded, then kept
        loaded = load_dataset(choice_of("plain", tmp_path))
        assert loaded.num_classes is loaded.train.labels is loaded.test is None
        (batch,) = take(loaded.train, 1, 4)
        assert batch["label"] is None
        assert batch["image"].shape == (4, 4, 6, 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"array_record"', '"tfrecord"', "need tensorflow"),
        ('"train"', '"rest"', "no split 'train'"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused(old, new, message, tmp_path):
    path = prepare(Stripes, tmp_path) / "dataset_info.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        describe_dataset(choice_of("stripes", tmp_path))


def test_a_set_of_images_of_many_sizes_is_refused(tmp_path):
    class Ragged(Stripes, skip_registration=True):
        features = {"image": tfds.features.Image(shape=(None, None, 3))}  # noqa: RUF012

    prepare(Ragged, tmp_path)
    with pytest.raises(ConfigError, match="no feature 'image' of uint8 and a fixed shape"):
        describe_dataset(choice_of("ragged", tmp_path))


@pytest.mark.parametrize(("mode", "channels"), [("LA", 2), ("RGBA", 4)])
def test_images_with_a_number_of_channels_that_cannot_be_drawn_are_refused(
    mode, channels, tmp_path
):
    class Transparent(Stripes, skip_registration=True):
        features = {  # noqa: RUF012
            "image": tfds.features.Image(shape=(4, 6, channels), encoding_format="png")
        }

        def _generate_examples(self):
            yield 0, {"image": Image.new(mode, (6, 4)), "label": 0}

    prepare(Transparent, tmp_path)
    message = f"has images of {channels} channels: must be 1 .grey. or 3 .RGB."
    with pytest.raises(ConfigError, match=message):
        describe_dataset(choice_of("transparent", tmp_path))


# Batches


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (7, 20), (12, 12), (1, 3), (200, 64)])
def test_every_epoch_is_another_permutation_and_nothing_is_dropped(size, batch_size):
    split = numbered(size)
    batches = take(split, -(-5 * size // batch_size), batch_size)
    for batch in batches:
        assert len(batch["label"]) == batch_size
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    epochs = labels_of(batches)[: 5 * size].reshape(5, size)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(size), (5, 1)))
    if size >= 10:
        assert len(np.unique(epochs, axis=0)) == 5


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("start_step", [1, 5, 10**9])
def test_a_batch_is_a_function_of_the_seed_and_the_step(flip, start_step):
    split = numbered(30)
    jumped = take(split, 3, 8, seed=3, start_step=start_step, flip=flip)
    again = take(split, 1, 8, seed=3, start_step=start_step + 2, flip=flip)
    np.testing.assert_array_equal(jumped[2]["image"], again[0]["image"])
    if start_step < 10:
        walked = take(split, start_step + 3, 8, seed=3, flip=flip)[start_step:]
        for one, other in zip(jumped, walked):
            np.testing.assert_array_equal(one["image"], other["image"])
            np.testing.assert_array_equal(one["label"], other["label"])


def test_starting_at_a_late_step_takes_no_longer():
    """Reading all batches before step 10^12 would take years."""
    assert len(take(numbered(30), 1, 8, start_step=10**12)) == 1


@pytest.mark.parametrize("seeds", [(0, 1), (5, 2**40), (-1, 1)])
def test_seeds_differ_in_every_epoch(seeds):
    # With seed + e for epoch e, epoch 1 of seed 0 would equal epoch 0 of seed 1
    split = numbered(50)
    epochs = [labels_of(take(split, 4, 50, seed=seed)).reshape(4, 50) for seed in seeds]
    assert len(np.unique(np.concatenate(epochs), axis=0)) == 8


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batch(process_count):
    images = np.random.default_rng(0).integers(0, 256, (30, 2, 3, 1), np.uint8)
    split = Split(images, np.arange(30, dtype=np.int32))
    whole = take(split, 5, 8, flip=True, start_step=2)
    shares = [
        take(split, 5, 8, flip=True, start_step=2, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    for batch, *parts in zip(whole, *shares):
        for name in ("image", "label"):
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])


def test_half_of_the_images_are_mirrored_exactly():
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 7, 3), np.uint8)
    split = Split(images, np.arange(40, dtype=np.int32))
    count = 0
    for batch in take(split, 40, 40, flip=True):
        original = images[batch["label"]]
        mirrored = (batch["image"] == original[:, :, ::-1]).all(axis=(1, 2, 3))
        same = (batch["image"] == original).all(axis=(1, 2, 3))
        assert (mirrored ^ same).all()
        count += mirrored.sum()
    assert count == pytest.approx(800, abs=5 * 20)  # binomial(1600, 1/2), five deviations


@pytest.mark.parametrize(("batch_size", "process_count"), [(0, 1), (-8, 1), (10, 4), (3, 2)])
def test_batch_sizes_that_cannot_be_shared_are_refused(batch_size, process_count):
    with pytest.raises(ValueError, match=f"batch_size = {batch_size}"):
        read_batches(numbered(10), batch_size, 0, process_count=process_count)


def test_points_have_no_mirror_image():
    points = Split(np.zeros((9, 2), np.float32), np.zeros(9, np.int32))
    with pytest.raises(ValueError, match="flip"):
        read_batches(points, 3, 0, flip=True)


# Pixels and x_0


@pytest.mark.parametrize("levels", [2, *LEVELS])
@pytest.mark.parametrize("wrap", [np.asarray, jax.numpy.asarray], ids=["numpy", "jax"])
def test_every_level_survives_the_way_to_x_0_and_back(levels, wrap):
    image = np.arange(levels, dtype=np.uint8)
    x_0 = to_x_0(wrap(image), levels)
    assert x_0.dtype == np.float32
    np.testing.assert_allclose(x_0, np.linspace(-1, 1, levels), atol=1e-7)
    written = to_uint8(x_0, levels)
    assert written.dtype == np.uint8
    np.testing.assert_array_equal(written, np.round(image * 255.0 / (levels - 1)))
    # A value rounds to its nearest level; values outside [-1, 1] are clipped
    for noise in (-0.99, 0.99):
        np.testing.assert_array_equal(to_uint8(x_0 + noise / (levels - 1), levels), written)
    assert to_uint8(wrap(np.float32([-3, 3])), levels).tolist() == [0, 255]


@pytest.mark.parametrize("levels", LEVELS)
def test_scaling_and_its_inverse_can_be_traced(levels):
    image = np.arange(levels, dtype=np.uint8)

    def there_and_back(image):
        return to_uint8(to_x_0(image, levels), levels)

    np.testing.assert_array_equal(jax.jit(there_and_back)(image), there_and_back(image))


def test_points_are_used_as_they_are():
    points = np.float32([[0.5, 3.0]])
    assert to_x_0(points, None) is points
    with pytest.raises(ValueError, match="points"):
        to_uint8(points, None)
