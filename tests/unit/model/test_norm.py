from __future__ import annotations

import pytest
import torch

from model.norm import rms_norm

pytestmark = pytest.mark.usefixtures("fresh_seed")

EPS = 1e-5


# One is compiled, the others go through torch's operators.
@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float32, (7, 70)), (torch.float32, (7, 3, 70)), (torch.float64, (7, 70))], ids=str
)
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-2, 1.0, 1e4])
def test_rows_of_any_size_are_normalised(dtype: torch.dtype, shape: tuple[int, ...], size: float) -> None:
    """Small ones come out small, and none gives what is no number: their mean square is beside `eps`."""
    x, weight = (size * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    mean_square = x.double().pow(2).mean(-1, keepdim=True)
    expected = weight.double() * x.double() / (mean_square + EPS).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, EPS).double(), expected, rtol=1e-5, atol=1e-6)
