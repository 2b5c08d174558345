"""The parts, in order of value: what comes first runs whatever happens later."""

from gpu_check.part import Part

AMPERE = (8, 0)
"""Compute capability of the A100, the first with bfloat16 and enough shared memory."""

PARTS = (
    Part("tests", "gpu_tests", "do all losses equal float64, and does the host never wait?", 1.4),
    Part("processes", "two_processes", "do two processes on one card equal one?", 0.4),
    Part("demo", "demo_curve", "does training on the card follow the CPU's curve?", 0.8),
    Part(
        "step",
        "step_parts",
        "milliseconds, memory and FLOP utilisation of a ViT-B/32 step, by part and method",
        2.0,
        AMPERE,
        gib=12,
    ),
    Part(
        "losses",
        "loss_forms",
        "fused kernels, row blocks and open_clip's losses: values, gradients, time, memory",
        1.2,
        AMPERE,
        gib=4,
    ),
    Part("exactness", "exactness", "accumulation, moving average, loss scale, exact resume", 0.6),
    Part(
        "open_clip",
        "open_clip_trainer",
        "open_clip's trainer on the same shards",
        0.8,
        packages=("open_clip_train", "webdataset"),
    ),
    Part("zero_shot", "zero_shot_speed", "images a second of zero-shot at 224 px", 0.4, gib=4),
    Part("reading", "reading", "how many workers keep the card busy?", 0.4, gib=10),
)
