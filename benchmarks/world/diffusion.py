"""SD's noise schedule, v-prediction in variance-exploding form, and an Euler sampler.

x_sigma = x0 + sigma * noise throughout, so sigma is the noise's standard deviation in
latent units.  The relation to the DDPM form (Ho et al., arXiv:2006.11239) is
sigma_t = sqrt((1 - abar_t) / abar_t).  The network sees x / sqrt(sigma^2 + 1) and the
index t, and predicts v (Salimans & Ho, arXiv:2202.00512), so that

    x0 = x / (sigma^2 + 1) - v * sigma / sqrt(sigma^2 + 1)

which is the host's V_PREDICTION with sigma_data = 1.
"""

import torch

TIMESTEPS = 1000
LINEAR_START = 0.00085
LINEAR_END = 0.012


def make_sigmas():
    """The 1000 sigmas of SD's "scaled linear" betas, ascending (0.029..14.6), float32.

    beta_t = (sqrt(0.00085) + t/999 * (sqrt(0.012) - sqrt(0.00085)))^2 (arXiv:2112.10752).
    """
    betas = torch.linspace(LINEAR_START**0.5, LINEAR_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, dim=0)
    return ((1 - abar) / abar).sqrt().float()


SIGMAS = make_sigmas()


def sigma_to_timestep(sigma):
    """Index t (int64, shape of sigma) of the table entry nearest to sigma in log sigma."""
    log_table = SIGMAS.log().to(sigma.device)
    distance = (sigma.float().log().reshape(1, -1) - log_table[:, None]).abs()
    return distance.argmin(dim=0).view(sigma.shape)


def timestep_to_sigma(timestep):
    """Sigma at a timestep in 0..999 (float, may be fractional), log-linear between entries."""
    table = SIGMAS.log().to(timestep.device)
    t = timestep.float().clamp(0, TIMESTEPS - 1)
    low, high = t.floor().long(), t.ceil().long()
    return torch.lerp(table[low], table[high], t.frac()).exp()


def sampling_sigmas(steps):
    """steps + 1 descending sigmas, evenly spaced in t from 14.6, ending in 0 (the host's "normal").

    Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: must be at least 1; 20 is the usual choice")
    sigmas = timestep_to_sigma(torch.linspace(TIMESTEPS - 1, 0, steps))
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _per_sample(sigma, x):
    return sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def scale_input(x, sigma):
    """x / sqrt(sigma^2 + 1): the network's input, of about unit variance.  sigma: (B,)."""
    return x / (_per_sample(sigma, x) ** 2 + 1).sqrt()


def x0_from_v(x, v, sigma):
    """x0 = x / (sigma^2 + 1) - v * sigma / sqrt(sigma^2 + 1).  x, v: (B, ...); sigma: (B,)."""
    s = _per_sample(sigma, x)
    return x / (s**2 + 1) - v * s / (s**2 + 1).sqrt()


def add_noise(x0, noise, sigma):
    """x0 + sigma * noise.  sigma: (B,)."""
    return x0 + _per_sample(sigma, x0) * noise


def loss_weight(sigma, cap=5.0):
    """Weight of the squared error of x0: min(1 + 1/sigma^2, cap), per sample.

    1 + 1/sigma^2 weighs x0's error as the plain squared error of v.  The cap is
    min-SNR's (Hang et al., arXiv:2303.09556), which keeps the nearly noise-free
    samples from dominating.  sigma: (B,), > 0.
    """
    return (1 + sigma.float() ** -2).clamp(max=cap)


def guided(denoise, context, uncond, guidance):
    """``denoise(x, sigma, context)`` with classifier-free guidance (arXiv:2207.12598).

    x0 = x0_uncond + guidance * (x0_cond - x0_uncond); both in one batch.  At
    guidance 1 the unconditional half is not computed.
    """
    if guidance == 1:
        return lambda x, sigma: denoise(x, sigma, context)

    def fn(x, sigma):
        both = denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([context, uncond]))
        cond, plain = both.chunk(2)
        return plain + guidance * (cond - plain)

    return fn


def sample_euler(denoise, x, sigmas):
    """Euler's method on dx/dsigma = (x - x0) / sigma (Karras et al., arXiv:2206.00364, Alg. 1).

    denoise(x, sigma) -> x0 with sigma (B,); x: start at noise level sigmas[0];
    sigmas: descending, the last 0.  Deterministic.  Returns the latents at sigmas[-1].
    """
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x0 = denoise(x, sigma.expand(len(x)).to(x.device))
        x = x + (following - sigma) * (x - x0) / sigma
    return x
