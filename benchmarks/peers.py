"""The cases as diffusers and denoising-diffusion-pytorch run them, with their fastest settings.

A contender is "diffusers" or "ddpp" (denoising-diffusion-pytorch) with options: "compile"
(torch.compile in its default mode), "reduce-overhead" and "max-autotune" (its other modes),
"channels_last". Adam is torch's fused one, and the EMA is one foreach call, as in the fastest
training scripts. In bfloat16 the weights are float32 in training and bfloat16 in sampling. If torch
sees a GPU, the peers run on it.
"""

import atexit
import copy
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from benchmarks.cases import SIZES, Size

Prepared = tuple[Callable[[], object], dict[str, Any]]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.benchmark = True  # autotune cuDNN's algorithms, as XLA always does
MODES = {"compile": "default", "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}


def device_kind() -> str:
    """The name of the GPU."""
    return torch.cuda.get_device_name()


def peak_of_device() -> int:
    """The peak of the bytes in use in the GPU's memory."""
    return torch.cuda.max_memory_allocated()


def saved_seconds() -> float:
    """The seconds that compiled programs of earlier processes saved; a worker sees none of them."""
    return 0.0


def program_seconds() -> float | None:
    """The seconds of the longest compilation; torch does not tell them."""
    return None


def create_diffusers(size: Size) -> torch.nn.Module:
    """The UNet2DModel that has the same layers as our U-Net."""
    shape, channels = size.shape, [size.width * m for m in size.channel_multipliers]
    heights = [shape[0] >> level for level in range(len(channels))]
    kinds = ["Attn" if height in size.attention_resolutions else "" for height in heights]
    return UNet2DModel(
        sample_size=shape[0],
        in_channels=shape[2],
        out_channels=shape[2],
        layers_per_block=size.num_blocks,
        block_out_channels=channels,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        attention_head_dim=size.head_channels,
        norm_num_groups=size.diffusers_groups,
        dropout=size.dropout,
    )


def create_ddpp(size: Size) -> torch.nn.Module:
    """The U-Net of denoising-diffusion-pytorch, which has linear attention at every level."""
    from denoising_diffusion_pytorch import Unet

    return Unet(
        size.width,
        dim_mults=size.channel_multipliers,
        channels=size.shape[2],
        dropout=size.dropout,
        attn_dim_head=size.head_channels,
    )


def create(contender: str, size: Size) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network, and the same network compiled as the contender's options say."""
    name, *options = contender.split()
    module = {"diffusers": create_diffusers, "ddpp": create_ddpp}[name](size).to(DEVICE)
    if "channels_last" in options:
        module = module.to(memory_format=torch.channels_last)
    modes = [MODES[option] for option in options if option in MODES]
    return module, torch.compile(module, mode=modes[0]) if modes else module


def num_parameters(module: torch.nn.Module) -> int:
    """The number of parameters of a network."""
    return sum(parameter.numel() for parameter in module.parameters())


def train_step(
    contender: str, size: str, batch_size: int, num_steps: int, dtype: str = "float32"
) -> Prepared:
    """Training steps: noising by the library's scheduler, loss, gradient, clipping, Adam, EMA."""
    chosen = SIZES[size]
    module, network = create(contender, chosen)
    parameters = list(module.parameters())
    average = [copy.deepcopy(parameter.detach()) for parameter in parameters]
    adam = torch.optim.Adam(parameters, 2e-4, fused=True)
    height, width, channels = chosen.shape
    images = np.random.default_rng(0).integers(0, 256, (batch_size, height, width, channels))
    images = torch.from_numpy(images.astype(np.uint8))
    if DEVICE == "cuda":
        images = images.pin_memory()

    if contender.startswith("ddpp"):
        from denoising_diffusion_pytorch import GaussianDiffusion

        process = GaussianDiffusion(
            network,
            image_size=height,
            timesteps=1000,
            beta_schedule="cosine",
            objective="pred_noise",
        ).to(DEVICE)

        def mean_loss(x_0: torch.Tensor) -> torch.Tensor:
            return process((x_0 + 1) / 2)  # GaussianDiffusion takes images in [0, 1]
    else:
        scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")

        def mean_loss(x_0: torch.Tensor) -> torch.Tensor:
            eps = torch.randn_like(x_0)
            timestep = torch.randint(0, 1000, (len(x_0),), device=DEVICE)
            x_t = scheduler.add_noise(x_0, eps, timestep)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
                output = network(x_t, timestep).sample
            return torch.nn.functional.mse_loss(output.float(), eps)

    def step() -> None:
        x_0 = images.to(DEVICE, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1
        if "channels_last" not in contender:
            x_0 = x_0.contiguous()
        mean_loss(x_0).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        adam.step()
        adam.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-4)

    def run() -> None:
        for _ in range(num_steps):
            step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run, {"num_parameters": num_parameters(module)}


def sample(
    contender: str,
    size: str,
    sampler: str,
    batch_size: int,
    num_steps: int,
    dtype: str = "float32",
) -> Prepared:
    """Sample a batch by the library's own pipeline, into the host's memory."""
    chosen = SIZES[size]
    module, network = create(contender, chosen)
    module.eval()
    if dtype == "bfloat16":
        if not contender.startswith("diffusers"):
            raise ValueError(f"{contender} samples in float32 only")
        # bfloat16 weights; x_t stays float32, because the pipeline cannot return bfloat16 images
        forward = module.to(torch.bfloat16).forward

        def in_bfloat16(x_t: torch.Tensor, timestep: torch.Tensor) -> UNet2DOutput:
            return UNet2DOutput(forward(x_t.bfloat16(), timestep).sample.float())

        module.forward = in_bfloat16
    about = {"num_parameters": num_parameters(module)}
    if contender.startswith("ddpp"):
        from denoising_diffusion_pytorch import GaussianDiffusion
        from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library

        library.tqdm = lambda steps, **_: steps
        is_ddim = sampler == "ddim"
        process = GaussianDiffusion(
            network,
            image_size=chosen.shape[0],
            timesteps=1000 if is_ddim else num_steps,
            sampling_timesteps=num_steps,
            beta_schedule="cosine",
            objective="pred_noise",
        )
        process.to(DEVICE)
        return lambda: process.sample(batch_size).cpu().numpy(), about
    pipelines = {"ancestral": (DDPMPipeline, DDPMScheduler), "ddim": (DDIMPipeline, DDIMScheduler)}
    create_pipeline, create_scheduler = pipelines[sampler]
    pipeline = create_pipeline(network, create_scheduler(1000, beta_schedule="squaredcos_cap_v2"))
    pipeline.set_progress_bar_config(disable=True)
    words = {"batch_size": batch_size, "num_inference_steps": num_steps, "output_type": "np"}
    return lambda: pipeline(**words).images, about


def train_and_sample(
    contender: str,
    size: str,
    batch_size: int,
    num_steps: int,
    num_images: int,
    num_sampling_steps: int,
) -> Prepared:
    """The work of one arm of an ablation; another network of the same size samples the images."""
    train, about = train_step(contender, size, batch_size, num_steps)
    draw, _ = sample(contender, size, "ancestral", num_images, num_sampling_steps)

    def run() -> None:
        train()
        draw()

    return run, about


def read_batches(contender: str, batch_size: int, num_batches: int) -> Prepared:
    """Shuffled batches from torch's DataLoader; tensors in memory are indexed a batch at a time."""
    source = np.random.default_rng(0)
    images = torch.from_numpy(source.integers(0, 256, (60_000, 28, 28, 1), np.uint8))
    dataset = torch.utils.data.TensorDataset(images, torch.randint(0, 10, (60_000,)))
    sampler = torch.utils.data.BatchSampler(
        torch.utils.data.RandomSampler(dataset), batch_size, drop_last=True
    )
    loader = torch.utils.data.DataLoader(dataset, sampler=sampler, batch_size=None)

    def run() -> None:
        read = 0
        while read < num_batches:
            for image, _ in loader:
                assert len(image) == batch_size
                read += 1
                if read == num_batches:
                    break

    return run, {}


def _saved(size: str) -> tuple[dict[str, Any], pathlib.Path]:
    module = create_diffusers(SIZES[size])
    adam = torch.optim.Adam(module.parameters(), 2e-4, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    average = copy.deepcopy(module).state_dict()
    state = {"params": module.state_dict(), "ema": average, "optimizer": adam.state_dict()}
    return state, pathlib.Path(folder) / "state.pt"


def save(contender: str, size: str) -> Prepared:
    """torch.save, and fsync: the file is on the disk at the end."""
    state, path = _saved(size)

    def run() -> None:
        with path.open("wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())

    return run, {}


def restore(contender: str, size: str) -> Prepared:
    """torch.load, which compares no digest."""
    state, path = _saved(size)
    torch.save(state, path)
    return lambda: torch.load(path), {}
