"""The variances of the reverse steps against the formulas of DDPM and iDDPM."""

import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import BETAS, columns, cosine_betas

from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.variances import VARIANCES


def test_the_fixed_variances_are_the_two_choices_of_ddpm():
    betas = cosine_betas(10)
    row = columns(betas)
    expected = {"beta": betas, "posterior": row.beta * row.noise_prev / row.noise}
    # At t = 1 beta~ is 0 and has no logarithm; an unclipped schedule uses beta there
    expected["posterior"][0] = betas[0]
    for name, values in expected.items():
        found = VARIANCES[name].log_variance(schedules.from_betas(betas), None)
        np.testing.assert_allclose(np.exp(found), values, rtol=1e-5)
    # beta~ < beta: they are optimal for x_0 a point and for x_0 ~ N(0, I) (DDPM section 3.2)
    assert np.all(expected["posterior"][1:] < expected["beta"][1:])


@pytest.mark.parametrize("name", BETAS)
def test_the_learned_range_is_the_interpolation_of_iddpm(name):
    """iDDPM eq. 15, with beta~ at t = 1 replaced by its value at t = 2, as in their code."""
    betas = BETAS[name](100)
    row = columns(betas)
    posterior = row.posterior_variance
    posterior[0] = posterior[1]
    schedule = schedules.clip_posterior_variance(schedules.from_betas(betas))
    for output in (-1.0, -0.2, 0.0, 1.0):
        f = (output + 1) / 2
        expected = f * np.log(betas) + (1 - f) * np.log(posterior)
        found = VARIANCES["learned_range"].log_variance(schedule, jnp.full(100, output))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_the_learned_log_variance_is_the_output_itself():
    output = jnp.linspace(-3, 2, 7)
    np.testing.assert_array_equal(
        VARIANCES["learned"].log_variance(schedules.cosine(7), output), output
    )
