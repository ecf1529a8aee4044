"""Waveforms to log-mel filterbanks, batched, on any device, as Kaldi computes them.

Axes: B batch, S samples, T frames, W samples of a window, F mel bins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.compliance.kaldi import get_mel_banks

_PREEMPHASIS = 0.97


class Fbank(nn.Module):
    """Log-mel filterbank of the HTK-compatible Kaldi recipe that AST and its successors use (Hanning, no dither).

    The order of operations is Kaldi's own. Near the floor, fp32 results depend on it by up to 6e-3, which is why this
    is neither an STFT with a filterbank behind it nor ever computed under autocast.

    Args:
        sample_rate: in Hz.
        hop: samples between the starts of two frames. Nothing else depends on it: with `C * hop` come exactly every
            C-th of the frames that come with `hop`.
        window: samples in a frame.
        num_mels: F.
        f_min: lower edge of the lowest mel filter in Hz.
        f_max: upper edge of the highest one in Hz.
    """

    hann: Tensor
    filters: Tensor

    def __init__(self, sample_rate: int, hop: int, window: int, num_mels: int, f_min: float, f_max: float) -> None:
        super().__init__()
        self.hop, self.window = hop, window
        self.fft_size = 1 << (window - 1).bit_length()
        filters, _ = get_mel_banks(num_mels, self.fft_size, sample_rate, f_min, f_max, 100.0, -500.0, 1.0)
        self.register_buffer("hann", torch.hann_window(window, periodic=False), persistent=False)
        # Kaldi has no weights for the Nyquist bin: (F, fft_size / 2) -> (fft_size / 2 + 1, F)
        self.register_buffer("filters", functional.pad(filters, (0, 1)).T.contiguous(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, S) -> (B, T, F) float32 natural logarithms, T = 1 + (S - window) // hop.

        Raises:
            ValueError: S is shorter than one window.
        """
        if waveform.shape[-1] < self.window:
            raise ValueError(f"{waveform.shape[-1]} samples are shorter than one window of {self.window}")
        with torch.autocast(waveform.device.type, enabled=False):
            if waveform.device.type != "cpu" or waveform.ndim == 1:
                return self._log_mel(waveform.float())
            # Clip by clip: what a clip's frames take fits the cache, and larger buffers come fresh from the system
            return torch.stack([self._log_mel(clip) for clip in waveform.float()])

    def _log_mel(self, waveform: Tensor) -> Tensor:
        frames = waveform.unfold(-1, self.window, self.hop)  # (..., T, W)
        padded = frames.new_zeros(*frames.shape[:-1], self.fft_size)  # here, or the FFT would copy once more
        frames = padded[..., : self.window].copy_(frames).sub_(frames.mean(-1, keepdim=True))
        before = torch.cat((frames[..., :1], frames[..., :-1]), dim=-1)
        frames.sub_(before.mul_(_PREEMPHASIS)).mul_(self.hann)
        spectrum: Tensor = torch.fft.rfft(padded)
        power = spectrum.real.square().add_(spectrum.imag.square())  # on a CPU five times as fast as abs().square()
        return (power @ self.filters).clamp_(min=torch.finfo(torch.float32).eps).log_()
