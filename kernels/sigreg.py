"""SIGReg: latents pushed towards an isotropic Gaussian, direction by direction (LeJEPA, Balestriero & LeCun 2025, arXiv 2511.08544).

    phi_m(t) = mean_n exp(i t <z_n, u_m>)                     characteristic function of the latents along direction u_m
    loss     = mean_m  integral exp(-t^2/2) |phi_m(t) - exp(-t^2/2)|^2 dt      Epps-Pulley; trapezoid rule over [-t_max, t_max]

Cost: 2 N D M FLOPs for the projections, then a sine and a cosine for each of N M knots / 2 angles. The integrand is even in t, so only t >= 0 is computed.
"""
import torch
from torch import Tensor


def sigreg_loss(z: Tensor, directions: Tensor, t_max: float = 3.0, knots: int = 10) -> Tensor:
    """z [N, D], directions [D, M] with unit columns -> 0-d loss in float32 (float64 for float64 input).

    Raises ValueError for other shapes, fewer than 2 knots, or directions that want a gradient: they are constants here.
    NaN in z gives NaN.
    """
    if z.ndim != 2 or directions.ndim != 2 or z.shape[1] != directions.shape[0] or 0 in (*z.shape, *directions.shape):
        raise ValueError(f"sigreg_loss needs z [N, D] and directions [D, M], got {tuple(z.shape)} and {tuple(directions.shape)}")
    if knots < 2 or not t_max > 0:
        raise ValueError(f"sigreg_loss needs knots >= 2 and t_max > 0, got {knots} and {t_max}")
    if directions.requires_grad:
        raise ValueError("sigreg_loss gives no gradient to directions: pass directions.detach()")
    with torch.autocast(z.device.type, enabled=False):  # statistics in full precision, whatever the networks use
        z = z if z.dtype == torch.float64 else z.float()
        t = torch.linspace(-t_max, t_max, knots, dtype=z.dtype, device=z.device)[knots // 2 :]
        weight = torch.full_like(t, 2 * 2 * t_max / (knots - 1))  # dt, for t and -t
        weight[-1] /= 2  # the trapezoid's ends count half
        if knots % 2:
            weight[0] /= 2  # t = 0 is its own mirror image
        gauss = torch.exp(-t.square() / 2)
        angle = (z @ directions.to(z.dtype)).unsqueeze(-1) * t  # [N, M, T]
        real, imaginary = angle.cos().mean(0), angle.sin().mean(0)  # [M, T]
        return (((real - gauss).square() + imaginary.square()) @ (weight * gauss)).mean()
