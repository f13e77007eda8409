"""States of torch that a call puts to its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from propmeta_edit.models.states import plain_torch


def model_on(device):
    """All that is looked at."""
    return SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device))]), modules=lambda: ())


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("is_on", [True, False])
def test_attention_on_cuda_is_not_cudnns(device, is_on):
    """Whatever the caller's state, which comes back; also from inside and out of a failure."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    model = model_on(device)
    try:
        torch.backends.cuda.enable_cudnn_sdp(is_on)
        with pytest.raises(KeyError), plain_torch(model):
            with plain_torch(model):
                assert torch.backends.cuda.cudnn_sdp_enabled() == (is_on and device == "cpu")
            assert torch.backends.cuda.cudnn_sdp_enabled() == (is_on and device == "cpu")
            raise KeyError
        assert torch.backends.cuda.cudnn_sdp_enabled() == is_on
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
