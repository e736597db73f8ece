"""Results that are the same to the bit each time, on a GPU too."""

import os

import torch

# With one of two sizes of its memory cuBLAS adds in a fixed order (cuBLAS, "Results reproducibility"). The other size
# is too small for its faster kernels.
_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
# NVLink's switches add in the order of arrival (nccl#1497); torch leaves them out only where NCCL_ALGO is not set.
_NCCL = {"NCCL_NVLS_ENABLE": "0"}


def compute_deterministically() -> None:
    """Take algorithms of cuDNN, cuBLAS and torch whose result does not depend on which thread comes first, and have
    inductor choose its kernels by rules instead of by trying which is fastest (pytorch#163589, #165950).

    It holds for this process, and must be called before anything is computed on a GPU. An operation of which there is
    no such algorithm raises RuntimeError, naming itself. NCCL's other algorithms add in an order that depends on the
    machines alone.
    """
    os.environ.update(_CUBLAS | _NCCL)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
