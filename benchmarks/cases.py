"""The cases of the benchmark: each is the same work for diffusion_jax and for its peers."""

from typing import Any, NamedTuple


class Size(NamedTuple):
    """The hyperparameters of a U-Net, and its images."""

    dataset: str
    shape: tuple[int, int, int]
    width: int
    channel_multipliers: tuple[int, ...]
    num_blocks: int
    attention_resolutions: tuple[int, ...]
    head_channels: int
    dropout: float
    num_parameters: int  # every contender of this architecture must have as many
    diffusers_groups: int  # diffusers has one number of groups for all norms


SIZES = {
    "mnist": Size("mnist", (28, 28, 1), 32, (1, 2, 2), 1, (7,), 32, 0.0, 1_112_801, 8),
    "cifar10": Size("cifar10", (32, 32, 3), 128, (1, 2, 2, 2), 2, (16,), 256, 0.1, 35_746_307, 32),
    "digits": Size("digits", (8, 8, 1), 32, (1, 2), 1, (4,), 32, 0.1, 701_345, 8),
    # for a quick test of the benchmarks themselves
    "tiny": Size("mnist", (28, 28, 1), 8, (1, 2), 1, (), 8, 0.0, 41_609, 2),
}

# The fields of a network of main.py that compiles and trains in seconds.
SMALL_NETWORK = {
    "schedule.num_timesteps": 20,
    "model.width": 16,
    "model.channel_multipliers": (1,),
    "model.num_blocks": 1,
    "model.attention_resolutions": (),
    "model.head_channels": 16,
}

# The environment of the processes of a case: "cpu" hides all GPUs, "gpu" uses the first one. There
# jax must not reserve three quarters of the memory at its start, because the peers need it too.
PLATFORMS = {
    "cpu": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    "gpu": {
        "JAX_PLATFORMS": "cuda",
        "CUDA_VISIBLE_DEVICES": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    },
}
EAGER = ("diffusers", "diffusers channels_last")
COMPILED = ("diffusers compile", "diffusers compile channels_last")
SAMPLING = EAGER[1], COMPILED[0], "ddpp"  # compiled, it samples faster without channels_last
# torch.compile's other modes are for GPUs: both use CUDA graphs, and the second autotunes kernels
ON_GPU = (
    "diffusers reduce-overhead channels_last",
    COMPILED[1],
    "diffusers max-autotune channels_last",  # last, because it compiles longest
)


class Case(NamedTuple):
    """One row of the table: the work of each contender, and the unit of its speed.

    ``do`` is the name of a function of benchmarks/ours.py and benchmarks/peers.py, and ``options``
    are its arguments.
    """

    title: str
    do: str
    options: dict[str, Any]
    amount: int  # of ``unit`` in one run
    unit: str
    per_second: bool  # the table shows units per second, not milliseconds per unit
    peers: tuple[str, ...]
    target: float | None = None  # ours / best peer in seconds, on two CPU cores or an H200
    platform: str = "cpu"  # of PLATFORMS


def _train_step(
    size: str, batch_size: int, num_steps: int, peers: tuple[str, ...], target: float | None
) -> Case:
    """Training steps: noising, loss, gradient, clipping, Adam, EMA."""
    options = {"size": size, "batch_size": batch_size, "num_steps": num_steps}
    title = f"train step, {size}, batch {batch_size}"
    return Case(title, "train_step", options, num_steps, "step", False, peers, target)


def _sample(
    sampler: str, batch_size: int, num_steps: int, peers: tuple[str, ...], target: float | None
) -> Case:
    """A chain of ``num_steps`` steps, from noise to images in the host's memory."""
    options = {"size": "mnist", "sampler": sampler}
    options |= {"batch_size": batch_size, "num_steps": num_steps}
    title = f"{sampler} sampling, mnist, batch {batch_size}, {num_steps} steps"
    return Case(title, "sample", options, num_steps, "step", False, peers, target)


def _growth(title: str, num_steps: int = 4, batch_size: int = 64, **fields: Any) -> Case:
    """Our training step with other values of fields, to show how its cost grows; no peers."""
    options = {"size": "mnist", "batch_size": batch_size, "num_steps": num_steps, "fields": fields}
    title = f"train step, mnist, {title}"
    return Case(title, "train_step", options, num_steps, "step", False, ())


def _on_gpu(do: str, target: float | None, num_steps: int, **options: Any) -> Case:
    """A case on a GPU: the network of 35.7 M parameters, in bfloat16."""
    options |= {"size": "cifar10", "num_steps": num_steps, "dtype": "bfloat16"}
    title = f"{do.replace('_', ' ')}, cifar10, bfloat16, batch {options['batch_size']}"
    return Case(title, do, options, num_steps, "step", False, ON_GPU, target, "gpu")


def _rehearsed(case: Case) -> Case:
    """A case of a GPU with a tiny network on a CPU: its numbers mean nothing."""
    options = case.options | {"size": "tiny", "num_steps": 2}
    options["batch_size"] = min(options["batch_size"], 16)
    title = f"{case.do.replace('_', ' ')}, tiny, bfloat16, batch {options['batch_size']}"
    return case._replace(title=title, options=options, amount=2, target=None, platform="cpu")


CASES = {
    "train-mnist": _train_step("mnist", 64, 4, (*EAGER, *COMPILED, "ddpp"), 1.0),
    "train-cifar10": _train_step("cifar10", 16, 1, (EAGER[1], COMPILED[1]), 1.0),
    "sample-1": _sample("ancestral", 1, 100, SAMPLING, 0.4),
    "sample-2": _sample("ancestral", 2, 100, SAMPLING, 0.4),
    "sample-16": _sample("ancestral", 16, 50, SAMPLING, 0.65),
    "sample-64": _sample("ancestral", 64, 20, SAMPLING, 0.65),
    "sample-256": _sample("ancestral", 256, 5, SAMPLING[:2], None),
    "ddim-16": _sample("ddim", 16, 50, SAMPLING, None),
    "data": Case(
        "batches of 128 of 60,000 images 28x28x1, shuffled, from memory",
        "read_batches",
        {"batch_size": 128, "num_batches": 400},
        400 * 128,
        "images",
        True,
        ("DataLoader",),
    ),
    "evaluate": Case(
        "terms of the variational bound, mnist, batch 64",
        "evaluate",
        {"size": "mnist", "num_examples": 64, "num_timesteps": 16},
        64 * 16,
        "images x timesteps",
        True,
        (),
    ),
    "save": Case(
        "save a checkpoint, cifar10: weights, averages, Adam's moments (572 MB)",
        "save",
        {"size": "cifar10"},
        1,
        "save",
        False,
        ("torch.save",),
    ),
    "restore": Case(
        "restore it (ours compares a digest)",
        "restore",
        {"size": "cifar10"},
        1,
        "restore",
        False,
        ("torch.save",),
    ),
    **{f"devices-{n}": _growth(f"batch 64, {n} devices", num_devices=n) for n in (1, 2, 4, 8)},
    **{
        f"timesteps-{n}": _growth(f"batch 64, T = {n:,}", **{"schedule.num_timesteps": n})
        for n in (100, 10_000)
    },
    **{f"batch-{n}": _growth(f"batch {n}", batch_size=n) for n in (16, 32, 128)},
    **{f"width-{n}": _growth(f"batch 64, width {n}", **{"model.width": n}) for n in (16, 64)},
}
GPU_CASES = {
    "gpu-train": _on_gpu("train_step", 0.8, 20, batch_size=128),
    "gpu-sample-256": _on_gpu("sample", 0.7, 20, batch_size=256, sampler="ancestral"),
    "gpu-sample-1": _on_gpu("sample", 0.3, 100, batch_size=1, sampler="ancestral"),
}
REHEARSED_CASES = {name: _rehearsed(case) for name, case in GPU_CASES.items()}
