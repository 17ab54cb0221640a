"""What a plan takes for granted, with the source of each figure."""

from __future__ import annotations

from dualray.platform.planning import kernels, memory, work
from dualray.platform.planning.setting import Setting


def assumptions(setting: Setting) -> dict[str, str]:
    """Sentences by topic, those of the hardware profile last."""
    hardware = setting.cluster.hardware
    found = {
        "matrix products": (
            f"tiles of {kernels.FP8_PRODUCT.tile_rows} x {kernels.FP8_PRODUCT.tile_columns} at "
            f"{kernels.FP8_PRODUCT.peak_share:.0%} of the FP8 peak and "
            f"{1e6 * kernels.FP8_PRODUCT.overhead_s:.1f} us a wave, weight gradients at "
            f"{kernels.FP8_WEIGHT_GRAD.peak_share:.0%} and "
            f"{1e6 * kernels.FP8_WEIGHT_GRAD.overhead_s:.1f} us (DeepGEMM on H800: README, pull "
            f"request 95); {kernels.BF16_PRODUCT.peak_share:.0%} of the BF16 peak (MAMF on H100)"
        ),
        "kernels of the report": (
            f"slower than DeepGEMM by {kernels.DENSE_SLOWDOWN}, grouped and weight gradients by "
            f"{kernels.GROUPED_SLOWDOWN} (DeepGEMM's speed-up over the tuned CUTLASS it replaced)"
        ),
        "passes over memory": (
            f"{kernels.TRAFFIC_SHARE:.0%} of the peak bandwidth (torchao's fused casts: 85 to 94 %)"
        ),
        "overlap": (
            f"{kernels.COMMUNICATION_SMS} SMs run the exchange while a pair computes (arXiv "
            "2412.19437, 3.2.2); outside of pairs, and in schedules without them, exchanges are "
            "not hidden"
        ),
        "experts": (
            f"the busiest expert rank has {work.EXPERT_IMBALANCE:.0%} more than the mean (MaxVio, "
            "arXiv 2408.15664, table 2)"
        ),
        "recomputed": "RMSNorms, up-projections of the latents, SwiGLU's output (3.2.3, 3.3.3)",
        "stages": (
            "layers are cut so that the longest rank is as short as can be (layout.layers sets "
            "a cut); a run file's own layout is cut as it will be"
        ),
        "optimizer": "ZeRO-1; sums of gradients and gathered weights are not hidden",
        "launches": "no time between kernels, so the smallest models are slower than planned",
        "reserved": (
            f"{memory.RESERVED_SHARE:.0%} of memory for drivers, communicators and fragments "
            "(assumed)"
        ),
    }
    shown = {
        "memory_bytes": f"{hardware.memory_bytes / 1e9:.1f} GB",
        "bf16_flops_per_s": f"{hardware.bf16_flops_per_s / 1e12:.0f} TFLOP/s",
        "fp8_flops_per_s": f"{hardware.fp8_flops_per_s / 1e12:.0f} TFLOP/s",
        "sustained_clock": f"{hardware.sustained_clock:.3f} of a short benchmark's clock",
        "attention_forward_flops_per_s": (
            f"{hardware.attention_forward_flops_per_s / 1e12:.0f} TFLOP/s"
        ),
        "attention_backward_flops_per_s": (
            f"{hardware.attention_backward_flops_per_s / 1e12:.0f} TFLOP/s"
        ),
        "hbm_bytes_per_s": f"{hardware.hbm_bytes_per_s / 1e12:.2f} TB/s",
        "nvlink_bytes_per_s": f"{hardware.nvlink_bytes_per_s / 1e9:.0f} GB/s each way",
        "network_bytes_per_s": f"{hardware.network_bytes_per_s / 1e9:.0f} GB/s a GPU each way",
        "dollars_per_gpu_hour": f"{hardware.dollars_per_gpu_hour:.2f} dollars",
    }
    for field, text in shown.items():
        name = field.removesuffix("_per_s").removesuffix("_bytes").removesuffix("_flops")
        found[name.replace("_", " ")] = f"{text}: {hardware.sources[field]}"
    return found
