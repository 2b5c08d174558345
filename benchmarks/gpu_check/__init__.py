"""Checks and measures neuclip on a GPU in some minutes: `scripts/gpu_check.sh`.

    part            Part: a question, its share of the time, and what it needs
    facts           the versions and the card
    plan            the parts, in order of value
    runner          runs each in a process with its own time limit
    child           such a process
    repeats         timings with their spread

and a module a part, with a function `run(job)`: `gpu_tests`, `two_processes`, `demo_curve`,
`step_parts`, `loss_forms`, `exactness`, `open_clip_trainer`, `zero_shot_speed`, `reading`.
"""
