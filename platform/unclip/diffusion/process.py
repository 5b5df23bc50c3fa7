"""The Gaussian diffusion process of DDPM (Ho et al. 2020) and improved DDPM (Nichol and Dhariwal 2021).

Notation: abar_t is `alphas_cumprod`; a step goes from timestep t to an earlier s, and everything about it follows from
abar_t and abar_s alone, with beta_{t|s} = 1 - abar_t / abar_s. So a list of timesteps is all a respaced chain needs.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator

from unclip.config.base import Config
from unclip.diffusion.schedules import BetaSchedule, beta_schedule, rescale_zero_terminal_snr

PredictionType = Literal["epsilon", "sample", "v_prediction"]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range", "analytic"]


class DiffusionConfig(Config):
    """A diffusion process and what the network that reverses it puts out."""

    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    """How noise grows with the timestep: linear, scaled_linear (latent diffusion's), or squaredcos_cap_v2 (cosine)."""

    num_train_timesteps: int = Field(default=1000, ge=1, le=100_000)
    """Number of steps of the forward process (T)."""

    zero_terminal_snr: bool = False
    """Whether the schedule is rescaled so that the last timestep is pure noise (Lin et al. 2023)."""

    prediction_type: PredictionType = "epsilon"
    """What the network predicts: the noise (epsilon), the clean sample (sample) or the velocity (v_prediction)."""

    variance_type: VarianceType = "fixed_small"
    """Variance of a reverse step: the posterior's (fixed_small), beta (fixed_large), learned between the two, or computed
    from how well the network predicts (analytic)."""

    analytic_noise_error: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Mean square of the network's noise prediction at each timestep, which variance_type analytic needs: the table that
    Analytic-DPM calls Gamma, measured on the data."""

    analytic_variance_bound: float = Field(default=1.0, gt=0)
    """Mean square of a component of the clean samples as the network sees them: no analytic variance of x_start is above."""

    clip_sample_range: float | None = Field(default=None, gt=0)
    """Predicted clean samples are clipped to plus and minus this while sampling; null for no clipping."""

    dynamic_threshold: float | None = Field(default=None, gt=0, le=1)
    """Imagen's dynamic thresholding while sampling: the quantile of absolute values, say 0.995; null for none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.clip_sample_range is not None and self.dynamic_threshold is not None:
            raise ValueError("clip_sample_range and dynamic_threshold exclude each other: set one of them to null")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "prediction_type epsilon cannot be used with zero_terminal_snr: the noise of pure noise says nothing about"
                " the clean sample; use v_prediction or sample"
            )
        _alphas_cumprod(self)  # refuses a schedule that T does not suit
        table, total = self.analytic_noise_error, self.num_train_timesteps
        if self.variance_type == "analytic" and table is None:
            raise ValueError("variance_type analytic needs analytic_noise_error, measured with the trained network")
        if table is not None and len(table) != total:
            raise ValueError(f"analytic_noise_error must have num_train_timesteps = {total} entries, not {len(table)}")
        return self

    def build(self) -> DiffusionProcess:
        return DiffusionProcess(self)


class DiffusionProcess:
    """Forward process, its posterior, and the reading of network outputs.

    Samples are (B, C, H, W) pictures or (B, D) vectors of any float type; `timesteps` and `prev_timesteps` are (B,)
    int64, each sample its own; -1 stands for the clean sample. Tables and coefficients are float64 and are cast to the
    type of the sample only when they meet it. Everything is finite where the terminal SNR is zero, too.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        alphas_cumprod = _alphas_cumprod(config)
        # Entry t + 1 belongs to timestep t: entry 0 is the clean sample (t = -1), the last one pure noise (t = T).
        self._alphas_cumprod = _Table(
            torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod, alphas_cumprod.new_zeros(1)])
        )
        if config.variance_type == "analytic":
            self._x_start_variance = _Table(_x_start_variance(config, alphas_cumprod))

    @property
    def num_train_timesteps(self) -> int:
        return self.config.num_train_timesteps

    def alphas_cumprod(self, timesteps: torch.Tensor) -> torch.Tensor:
        """abar at `timesteps` (B,) in -1..T: (B,) float64, from 1 (clean, t = -1) to 0 (pure noise, t = T)."""
        return self._alphas_cumprod[timesteps + 1]

    def q_sample(self, x_start: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t drawn from q(x_t | x_start) with standard normal `noise` (DDPM eq. 4)."""
        signal, sigma = self._signal_and_sigma(timesteps, like=x_start)
        return signal * x_start + sigma * noise

    def split(self, model_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(prediction, variance values): the halves of dim 1 with a learned variance, else (model_output, None)."""
        if self.config.variance_type != "learned_range":
            return model_output, None
        if model_output.shape[1] % 2:
            raise ValueError(
                "variance_type learned_range needs twice the channels of the sample,"
                f" not a model_output of shape {tuple(model_output.shape)}"
            )
        prediction, variance_values = model_output.chunk(2, dim=1)
        return prediction, variance_values

    def target(self, x_start: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network should predict: the noise, x_start, or v (Salimans and Ho 2022, appendix D)."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return x_start
        signal, sigma = self._signal_and_sigma(timesteps, like=x_start)
        return signal * noise - sigma * x_start

    def raw_x_start(self, prediction: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The clean sample that a prediction implies, not thresholded; `prediction` is shaped like `x_t`."""
        if prediction.shape != x_t.shape:
            raise ValueError(f"prediction has shape {tuple(prediction.shape)}, but x_t {tuple(x_t.shape)}")
        signal, sigma = self._signal_and_sigma(timesteps, like=x_t)
        if self.config.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / signal
        if self.config.prediction_type == "sample":
            return prediction
        return signal * x_t - sigma * prediction

    def pred_x_start(self, prediction: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The clean sample that a prediction implies, thresholded as configured."""
        x_start = self.raw_x_start(prediction, x_t, timesteps)
        if self.config.clip_sample_range is not None:
            return x_start.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if self.config.dynamic_threshold is not None:
            return _dynamic_threshold(x_start, self.config.dynamic_threshold)
        return x_start

    def pred_noise(self, pred_x_start: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise that takes `pred_x_start` to `x_t`."""
        signal, sigma = self._signal_and_sigma(timesteps, like=x_t)
        return (x_t - signal * pred_x_start) / sigma

    def posterior(
        self, x_start: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor, prev_timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of q(x_s | x_t, x_start) (DDPM eq. 7); the log variance broadcasts over the sample.

        At a step to the clean sample the mean is `x_start` and the variance 0; the log variance is then that of the
        step above it, as in guided-diffusion.
        """
        abar_t, abar_s = self.alphas_cumprod(timesteps), self.alphas_cumprod(prev_timesteps)
        noisy_weight = _alpha(abar_t, abar_s).sqrt() * (1 - abar_s) / (1 - abar_t)
        mean = per_sample(_start_weight(abar_t, abar_s), x_t) * x_start + per_sample(noisy_weight, x_t) * x_t
        return mean, per_sample(self._log_beta_tilde(timesteps, prev_timesteps), x_t)

    def model_log_variance(
        self,
        variance_values: torch.Tensor | None,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        prev_timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """Log variance of the reverse step p(x_s | x_t), broadcasting over `x_t`.

        `variance_values` is the second half of the network's output where the variance is learned, else None: -1 gives
        the posterior's log variance, +1 log beta, and values between interpolate (improved DDPM eq. 15).
        """
        log_beta_tilde = self._log_beta_tilde(timesteps, prev_timesteps)
        if self.config.variance_type == "fixed_small":
            return per_sample(log_beta_tilde, x_t)
        if self.config.variance_type == "analytic":
            return per_sample(self._log_analytic_variance(timesteps, prev_timesteps), x_t)
        log_beta = (1 - _alpha(self.alphas_cumprod(timesteps), self.alphas_cumprod(prev_timesteps))).log()
        if self.config.variance_type == "fixed_large":
            # Beta is far too large a variance for the last step; guided-diffusion too takes the posterior's there.
            return per_sample(torch.where(prev_timesteps < 0, log_beta_tilde, log_beta), x_t)
        if variance_values is None:
            raise ValueError("variance_type learned_range needs variance_values, the second half of the model_output")
        fraction = (variance_values + 1) / 2
        return fraction * per_sample(log_beta, x_t) + (1 - fraction) * per_sample(log_beta_tilde, x_t)

    def _log_beta_tilde(self, timesteps: torch.Tensor, prev_timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) float64 log of the posterior variance; a step to the clean sample takes that of the step above it."""
        last = prev_timesteps < 0
        abar_t = self.alphas_cumprod(torch.where(last, timesteps + 1, timesteps))
        abar_s = self.alphas_cumprod(torch.where(last, timesteps, prev_timesteps))
        return _beta_tilde(abar_t, abar_s).log()

    def _log_analytic_variance(self, timesteps: torch.Tensor, prev_timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) float64 log of the best variance of a Gaussian p(x_s | x_t) (Bao et al. 2022, theorem 1).

        By the law of total variance it is that of q(x_s | x_t, x_start), beta_tilde, and what the posterior mean varies
        with x_start: start_weight^2 Cov[x_start | x_t]. That makes it the true one where the data are Gaussian. At a
        step to the clean sample Cov[x_start | x_t] is left; it is kept from 0 by the posterior's of the step above.
        """
        abar_t, abar_s = self.alphas_cumprod(timesteps), self.alphas_cumprod(prev_timesteps)
        explained = _start_weight(abar_t, abar_s) ** 2 * self._x_start_variance[timesteps]
        variance = _beta_tilde(abar_t, abar_s) + explained
        return torch.maximum(variance.log(), self._log_beta_tilde(timesteps, prev_timesteps))

    def _signal_and_sigma(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(abar) and sqrt(1 - abar), ready to be multiplied with `like`."""
        abar = self.alphas_cumprod(timesteps)
        return per_sample(abar.sqrt(), like), per_sample((1 - abar).sqrt(), like)


class _Table:
    """Numbers by index, copied once to every device that asks."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self._copies = {values.device: values}

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        if index.device not in self._copies:
            self._copies[index.device] = self._values.to(index.device)
        return self._copies[index.device][index]


def per_sample(coefficients: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B,) coefficients as (B, 1, ...) of the type and device of `x` (B, ...)."""
    return coefficients.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _alphas_cumprod(config: DiffusionConfig) -> torch.Tensor:
    """(T,) float64."""
    alphas_cumprod = (1 - beta_schedule(config.beta_schedule, config.num_train_timesteps)).cumprod(dim=0)
    return rescale_zero_terminal_snr(alphas_cumprod) if config.zero_terminal_snr else alphas_cumprod


def _alpha(abar_t: torch.Tensor, abar_s: torch.Tensor) -> torch.Tensor:
    """1 - beta_{t|s}; 0 for a step from pure noise, where two zeros may meet."""
    return torch.where(abar_t > 0, abar_t / abar_s, 0.0)


def _start_weight(abar_t: torch.Tensor, abar_s: torch.Tensor) -> torch.Tensor:
    """What the posterior mean of x_s takes of x_start (DDPM eq. 7)."""
    return abar_s.sqrt() * (1 - _alpha(abar_t, abar_s)) / (1 - abar_t)


def _beta_tilde(abar_t: torch.Tensor, abar_s: torch.Tensor) -> torch.Tensor:
    """The variance of q(x_s | x_t, x_start) (DDPM eq. 7)."""
    return (1 - abar_s) / (1 - abar_t) * (1 - _alpha(abar_t, abar_s))


def _x_start_variance(config: DiffusionConfig, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """(T,) E[tr Cov[x_start | x_t]] / D from Gamma_t = E|E[noise | x_t]|^2 / D (Bao et al. 2022, eq. 9).

    x_start = (x_t - sqrt(1 - abar) noise) / sqrt(abar), so given x_t it varies as the noise does, (1 - abar) / abar times
    as much, and the noise, of mean square 1, varies by 1 - Gamma_t.

    It lies between 0 and (1 - abar) / abar, which is theorem 2's first bound. Its second takes pixels in [-1, 1], whose
    variance is at most 1. Scaled embeddings have no such range, but by the law of total variance
    E[tr Cov[x_start | x_t]] <= tr Cov[x_start] <= E|x_start|^2, so their mean square M (analytic_variance_bound; 1 where
    components have mean 0 and variance 1) takes that 1's place: the step's variance is at most beta_tilde +
    start_weight^2 M. The bounds matter at high noise, where a Gamma_t near 1 is divided by an abar near 0. Pure noise
    tells nothing of x_start, of which only the bound is known.
    """
    noise_error = torch.tensor(config.analytic_noise_error, dtype=torch.float64, device="cpu")
    bound = config.analytic_variance_bound
    estimate = (1 - alphas_cumprod) / alphas_cumprod * (1 - noise_error)
    return torch.where(alphas_cumprod > 0, estimate, bound).clamp(0, bound)


def _dynamic_threshold(x_start: torch.Tensor, quantile: float) -> torch.Tensor:
    """Clips each sample to [-s, s] and divides by s, its `quantile` of absolute values or 1 (Imagen, section 2.3)."""
    scale = torch.quantile(x_start.flatten(1).abs().float(), quantile, dim=1).clamp(min=1)
    scale = per_sample(scale, x_start)
    return x_start.clamp(-scale, scale) / scale
