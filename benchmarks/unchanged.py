r"""Whether an earlier revision and the working tree give the same results, bit for bit.

    python -m benchmarks.unchanged --before=0a48fca [--archives=FOLDER] [PART ...]

Both run the same small commands of main.py, each in a process of its own on a CPU. The files that
they write are compared: losses and checkpoints of 20 steps; samples of every sampler, edit and
guidance; evaluations. The part "folders" lets the working tree go on with folders of the earlier
revision. Without PART all parts run. The losses of MNIST need its original archives and are left
out without --archives. Each comparison is a line; the exit status is 1 if anything differs.
"""

import argparse
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from orbax.checkpoint import v1 as ocp
from PIL import Image

REPOSITORY = pathlib.Path(__file__).parent.parent
Fields = dict[str, Any]  # of the config, and its file: {"schedule.s": 0.02}

TWENTY_STEPS = {
    "train.num_steps": 20,
    "train.log_every_steps": 1,
    "sampling.num_images": 4,
    "sampling.num_steps": 2,
    "sampling.num_frames": 0,
}
TINY = TWENTY_STEPS | {
    "num_devices": 2,
    "schedule.num_timesteps": 20,
    "model.width": 8,
    "model.channel_multipliers": (1,),
    "model.attention_resolutions": (),
    "model.head_channels": 8,
    "optimizer.warmup_steps": 5,
    "optimizer.decay": "constant",
    "train.batch_size": 16,
    "train.sample_every_steps": 0,
    "checkpoint.every_steps": 10,
    "sampling.num_images": 16,
    "sampling.num_steps": 5,
    "evaluate.num_examples": 16,
    "evaluate.num_timesteps": 10,
    "evaluate.flow_examples": 4,
    "evaluate.flow_steps": 5,
}
LOSSES = {"digits": {}, "mnist": {"train.batch_size": 8}, "toy2d": {}}  # by config file
SAMPLERS = (
    *("ancestral", "ddim", "euler", "euler_ancestral", "heun", "edm", "dpmpp_1s", "dpmpp_2s"),
    *("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unipc", "plms", "pndm", "predictor_corrector"),
)
BY_SAMPLER = {name: {"sampling.sampler": name} for name in SAMPLERS}
EDITED = {"editing.images": "in.npz", "sampling.num_steps": None, "sampling.sampler": "ddim"}
OF_IMAGES = {
    "karras": {"sampling.sampler": "heun", "sampling.spacing": "karras"},
    "guidance": {"guidance.weight": 1.5, "guidance.weak_step": 10},
    "inpaint": {
        "editing.task": "inpaint",
        "editing.images": "in.npz",
        "editing.mask": "mask.png",
        "editing.jump_length": 2,
        "editing.num_resamples": 2,
    },
    "image_to_image": EDITED | {"editing.task": "image_to_image", "editing.timestep": 8},
    "interpolate": EDITED | {"editing.task": "interpolate"},
    "variations": EDITED | {"editing.task": "variations"},
}
POINTS = {name: value for name, value in TINY.items() if not name.startswith("model.")}
SAMPLES = {"digits": (TINY, BY_SAMPLER | OF_IMAGES), "toy2d": (POINTS, BY_SAMPLER)}
ABLATION = TINY | {
    "ablate.grid": "schedule.s=0.008,0.02",
    "ablate.seeds": (0,),
    "ablate.distance": "kernel",
}


class Tree(NamedTuple):
    """The files of a revision, and the folder that its commands run in."""

    root: pathlib.Path
    folder: pathlib.Path

    def python(self, *words: str) -> str:
        """The output of a Python process that imports this tree's package; exits if it fails."""
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(self.root)}
        how = {"cwd": self.folder, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, *words], **how)
        if done.returncode:
            sys.exit(f"{self.root}: {' '.join(words)} ended with {done.returncode}\n{done.stderr}")
        return done.stdout + done.stderr

    def main(
        self, workdir: str, fields: Fields, mode: str = "train", config: str = "digits"
    ) -> str:
        """The output of main.py; its paths are relative to ``folder``, equal in both trees."""
        flags = [f"--config={self.root}/configs/{config}.py", f"--workdir={workdir}"]
        fields = {"dataset.data_dir": "data", "compilation_cache": "../cache", **fields}
        flags += [f"--mode={mode}", *(f"--config.{name}={fields[name]}" for name in fields)]
        return self.python(f"{self.root}/main.py", *flags)


class Comparison:
    """Two trees, and the comparisons of the files that they wrote."""

    def __init__(self, before: Tree, after: Tree, archives: str | None) -> None:
        self.before, self.after, self.archives = before, after, archives
        self.num_different = 0

    def __iter__(self) -> Iterator[Tree]:
        return iter((self.before, self.after))

    def say(self, title: str, before: object, after: object) -> None:
        """Print whether two values are equal."""
        self.num_different += before != after
        print(f"{title}: {'equal' if before == after else 'DIFFERENT'}", flush=True)

    def files(self, title: str, *names: str) -> None:
        """Compare the contents of the files of these names in both trees."""
        for name in names:
            read = READERS[pathlib.Path(name).suffix]
            self.say(f"{title}, {name}", *(read(tree.folder / name) for tree in self))

    def hand_over(self, workdir: str) -> None:
        """Copy a folder that the earlier revision wrote to the working tree."""
        shutil.copytree(self.before.folder / workdir, self.after.folder / workdir)


def digest(arrays: dict[str, np.ndarray]) -> list[tuple[str, str, tuple[int, ...], str]]:
    """Names, types, shapes and bytes of arrays."""
    return [
        (name, str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())
        for name, array in sorted(arrays.items())
    ]


def read_arrays(path: pathlib.Path) -> list[Any]:
    """The arrays of an .npz."""
    with np.load(path) as arrays:
        return digest(dict(arrays))


def read_records(path: pathlib.Path) -> list[Fields]:
    """The records of metrics.jsonl without the speed."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: r[name] for name in r if name != "images_per_second"} for r in records]


def read_checkpoint(path: pathlib.Path) -> list[Any]:
    """The arrays of a step's checkpoint."""
    saved = ocp.metadata(path).metadata
    return digest(ocp.load(path, {name: np.empty(s.shape, s.dtype) for name, s in saved.items()}))


READERS: dict[str, Callable[[pathlib.Path], Any]] = {
    ".npz": read_arrays,
    ".jsonl": read_records,
    ".json": lambda path: json.loads(path.read_text()),
    ".csv": pathlib.Path.read_text,
    "": read_checkpoint,
}


def losses(both: Comparison) -> None:
    """Losses and gradient norms of 20 steps, and the last checkpoint."""
    for name, fields in LOSSES.items():
        if name == "mnist":
            if both.archives is None:
                print("losses, mnist: LEFT OUT, because --archives is not set", flush=True)
                continue
            fields = fields | {"dataset.archives": both.archives}
        for tree in both:
            tree.main(f"losses/{name}", TWENTY_STEPS | fields, config=name)
        both.files("losses", f"losses/{name}/metrics.jsonl", f"losses/{name}/checkpoints/20")


def samples(both: Comparison) -> None:
    """Samples of a model of images and of a model of points; points are not rounded to levels."""
    inputs = np.random.default_rng(0).integers(256, size=(2, 8, 8, 1), dtype=np.uint8)
    for tree in both:
        np.savez(tree.folder / "in.npz", images=inputs)
        Image.fromarray(np.uint8(255 * np.tri(8))).save(tree.folder / "mask.png")
    for config, (trained, cases) in SAMPLES.items():
        workdir = f"samples/{config}"
        both.before.main(workdir, trained, config=config)
        both.hand_over(workdir)
        for name, fields in cases.items():
            for tree in both:
                (tree.folder / workdir / "samples/samples.npz").unlink()
                tree.main(workdir, trained | fields, "sample", config)
            both.files(name, f"{workdir}/samples/samples.npz")


def evaluate(both: Comparison) -> None:
    """The bound and the flow's likelihood of one trained model."""
    both.before.main("evaluate", TINY)
    both.hand_over("evaluate")
    for tree in both:
        tree.main("evaluate", TINY, "evaluate")
    both.files("evaluate", *(f"evaluate/evaluation.{suffix}" for suffix in ("json", "csv", "npz")))


def contents(path: pathlib.Path) -> dict[pathlib.Path, tuple[bytes, int]]:
    """The bytes and the modification time of every file in a folder, except its lock."""
    files = [file for file in path.rglob("*") if file.is_file() and file != path / ".lock"]
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def folders(both: Comparison) -> None:
    """A run that the earlier revision began is resumed, and its finished ablation is reported."""
    both.before.main("run", TINY | {"train.num_steps": 10})
    both.hand_over("run")
    for tree, mode in itertools.product(both, ("train", "sample", "evaluate")):
        tree.main("run", TINY, mode)
    names = "metrics.jsonl", "checkpoints/20", "samples/samples.npz", "evaluation.json"
    both.files("folders, resumed", *(f"run/{name}" for name in names))
    both.before.main("ablation", ABLATION, "ablate")
    both.hand_over("ablation")
    path = both.after.folder / "ablation"
    reports = path / "ablation.csv", path / "report.html"
    for report in reports:
        report.unlink()
    before = contents(path)
    output = both.after.main("ablation", ABLATION, "ablate")
    both.say(
        "folders, finished ablation: its files", True, contents(path).items() >= before.items()
    )
    is_idle = "2 finished" in output and "training" not in output and "scoring" not in output
    both.say("folders, finished ablation: trains and scores nothing", True, is_idle)
    both.say("folders, finished ablation: reports", True, all(file.exists() for file in reports))
    both.files("folders, finished ablation", "ablation/ablation.csv")


PARTS = {"losses": losses, "samples": samples, "evaluate": evaluate, "folders": folders}


def main() -> None:
    """Check out the earlier revision, compare it with the working tree, and remove it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--before", required=True, help="the earlier revision, for example 0a48fca")
    parser.add_argument("--archives", type=os.path.abspath, help="folder of the MNIST archives")
    parser.add_argument("parts", nargs="*", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree is removed
    git = "git", "-C", str(REPOSITORY), "worktree"
    with tempfile.TemporaryDirectory() as scratch:
        root = pathlib.Path(scratch)
        earlier = root / "earlier"
        subprocess.run([*git, "add", "--detach", "-q", earlier, arguments.before], check=True)
        try:
            trees = Tree(earlier, root / "before"), Tree(REPOSITORY, root / "after")
            for tree in trees:
                tree.folder.mkdir()
                path = tree.python("-c", "import diffusion_jax; print(diffusion_jax.__path__[0])")
                if not pathlib.Path(path.strip()).is_relative_to(tree.root):
                    sys.exit(f"{tree.root}: its processes import {path.strip()}")
            both = Comparison(*trees, arguments.archives)
            for part in arguments.parts or PARTS:
                PARTS[part](both)
        finally:
            subprocess.run([*git, "remove", "--force", earlier], check=True)
    print(f"{both.num_different} differences")
    sys.exit(both.num_different > 0)


if __name__ == "__main__":
    main()
