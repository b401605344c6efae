import torch

from stackwise.ops.precision import resolve_device


def test_fp32_products_run_in_tf32_on_cuda_and_in_fp32_elsewhere(monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        resolve_device("cpu")
        assert torch.get_float32_matmul_precision() == "highest"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for name in ("cuda", "auto"):
            torch.set_float32_matmul_precision("highest")
            assert resolve_device(name).type == "cuda" and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
