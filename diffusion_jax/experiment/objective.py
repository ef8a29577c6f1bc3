"""The training objective of a config: prediction, weighting, variance and timesteps."""

from ml_collections import ConfigDict

from diffusion_jax.data.dataset import DatasetInfo
from diffusion_jax.diffusion import weightings
from diffusion_jax.diffusion.losses import Objective
from diffusion_jax.diffusion.parametrisations import PREDICTIONS, determines_x_0
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.timesteps import TIMESTEP_SAMPLERS
from diffusion_jax.diffusion.variances import VARIANCES
from diffusion_jax.errors import choose, in_section, require
from diffusion_jax.experiment.arguments import arguments_of

VLB_SCALE = 1e-3  # of L_vlb in L_hybrid (iDDPM section 3.1)


def create_objective(config: ConfigDict, schedule: Schedule, dataset: DatasetInfo) -> Objective:
    """The training objective of a config, for a schedule and a data set.

    Raises:
        ConfigError: an unknown choice, a number out of its range, or a prediction that does not
            determine x_0 at every timestep (eps at zero SNR).
    """
    fields = config.loss
    parametrisation = choose("config.loss.prediction", fields.prediction, PREDICTIONS, "prediction")
    if not determines_x_0(parametrisation, schedule):
        possible = [name for name, other in PREDICTIONS.items() if determines_x_0(other, schedule)]
        ends = "ends at zero SNR"
        if not schedule.alpha_bar_prev[-1] > 0:
            ends = "reaches zero SNR before its last timestep"
        allowed = f"{' or '.join(possible)}: the schedule {ends}, where x_t says nothing of x_0"
        require(False, "config.loss.prediction", fields.prediction, allowed)
    variance = choose("config.loss.variance", fields.variance, VARIANCES, "variance")
    weighting = create_weighting(config)
    is_vlb = fields.weighting == "vlb"
    if fields.vlb_scale is not None:
        require(
            variance.is_learned and not is_vlb,
            "config.loss.vlb_scale",
            fields.vlb_scale,
            "unset: L_vlb is added only to a weighted error, and only if the variance is learned",
        )
        require(fields.vlb_scale > 0, "config.loss.vlb_scale", fields.vlb_scale, "above 0")
    dropout = fields.label_dropout
    require(0 <= dropout < 1, "config.loss.label_dropout", dropout, "in [0, 1)")
    return Objective(
        parametrisation=parametrisation,
        weighting=weighting,
        is_vlb=is_vlb,
        variance=variance,
        vlb_scale=VLB_SCALE if fields.vlb_scale is None else fields.vlb_scale,
        timesteps=choose(
            "config.loss.timesteps", fields.timesteps, TIMESTEP_SAMPLERS, "timestep sampler"
        ),
        levels=dataset.levels,
        num_classes=dataset.num_classes,
        label_dropout=dropout,
    )


def create_weighting(config: ConfigDict) -> weightings.Weighting:
    """The weighting of a config, with the arguments that the config sets."""
    fields = config.loss
    function = choose("config.loss.weighting", fields.weighting, weightings.WEIGHTINGS, "weighting")
    arguments = arguments_of(weightings.WEIGHTINGS, fields.weighting, "loss", fields)
    with in_section("config.loss"):
        return function(**arguments)
