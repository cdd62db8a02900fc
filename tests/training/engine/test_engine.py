"""What `training/engine/engine.py` works around in DeepSpeed, and how it starts."""

import inspect

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from pipeline.console import UserError
from pipeline.training.engine import engine


def test_deepspeed_still_broadcasts_frozen_parameters_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when DeepSpeed no longer looks at the attribute, or no longer broadcasts what is frozen: then the mark can go."""
    sent: list[int] = []
    monkeypatch.setattr("deepspeed.comm.broadcast", lambda tensor, *a, **k: sent.append(tensor.numel()))
    module = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(2, 2, bias=False))
    module[0].requires_grad_(False)

    class Stub:
        """As much of an engine as `_broadcast_model` reads."""

        dist_backend, seq_data_parallel_group, expert_data_parallel_group = "gloo", None, None

    stub = Stub()
    stub.module = module  # type: ignore[attr-defined]
    monkeypatch.setattr("deepspeed.utils.groups._get_broadcast_src_rank", lambda: 0)
    DeepSpeedEngine._broadcast_model(stub)
    assert sent == [36, 16]  # bytes: the frozen weight too
    sent.clear()
    engine._broadcast_only_trained(module)
    DeepSpeedEngine._broadcast_model(stub)
    assert sent == [16]


def test_an_old_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.check_version()
    monkeypatch.setattr(engine.deepspeed, "__version__", "0.18.4+cu130")
    with pytest.raises(UserError, match=r"0\.18\.4"):
        engine.check_version()


def test_deepspeed_gets_no_numerics_to_decide() -> None:
    """Its config would cast parameters, wrap the optimizer and clip by the first stage's norm."""
    source = inspect.getsource(engine.build)
    assert '"gradient_clipping": 0.0' in source
    assert not any(block in source for block in ("bf16", "fp16", "zero_optimization"))
