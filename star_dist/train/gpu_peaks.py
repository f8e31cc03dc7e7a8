"""What GPUs can do by their data sheets. Imports no torch, so that the planner can read it at once."""

from __future__ import annotations

# Dense bf16 peaks in TFLOP/s from NVIDIA's data sheets (half of those with sparsity), looked up from the top. NVL:
# https://www.nvidia.com/en-us/data-center/h100/ and …/h200/, 1,671 with sparsity. H800 and A800 are H100 and A100 with
# slower links, GH200 is an H100 with other memory. GB200: …/gb200-nvl72/, 360 PFLOP/s with sparsity of 72 GPUs.
GPU_PEAK_TFLOPS = {
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "GH200": 989.0,
    "H20": 148.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
}
