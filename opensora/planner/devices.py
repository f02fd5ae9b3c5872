"""What accelerators can do, as their makers say; for forecasts only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator and its links."""

    flops: float  # peak of dense bf16 products, FLOP/s
    memory: int  # bytes
    node_bandwidth: float  # to the others of its node, bytes/s in one direction
    net_bandwidth: float  # to other nodes, bytes/s in one direction, per accelerator
    host_bandwidth: float  # to CPU memory, bytes/s in one direction
    per_node: int = 8


GIB, GB, TFLOPS = 2**30, 1e9, 1e12

DEVICES = {
    # NVIDIA H100 SXM data sheet: 989 TFLOP/s, 80 GB, NVLink 900 GB/s both ways, PCIe 5.0 x16. DGX H100: 400 Gbit/s per
    # GPU.
    "h100": Device(989 * TFLOPS, 79 * GIB, 450 * GB, 50 * GB, 64 * GB),
    # NVIDIA H200 SXM data sheet: as H100, with 141 GB.
    "h200": Device(989 * TFLOPS, 139 * GIB, 450 * GB, 50 * GB, 64 * GB),
    # NVIDIA A100 SXM data sheet: 312 TFLOP/s, 80 GB, NVLink 600 GB/s both ways, PCIe 4.0. DGX A100: 200 Gbit/s per GPU.
    "a100": Device(312 * TFLOPS, 79 * GIB, 300 * GB, 25 * GB, 32 * GB),
    # NVIDIA Ada white paper: 165.2 TFLOP/s (fp32 sums), 24 GB; PCIe 4.0 x16: 32 GB/s; a net of 25 Gbit/s assumed.
    "rtx4090": Device(165 * TFLOPS, 23 * GIB, 25 * GB, 3 * GB, 32 * GB),
    # An assumption, for tries: a few cores.
    "cpu": Device(0.15 * TFLOPS, 16 * GIB, 2 * GB, 0.1 * GB, 10 * GB),
}
