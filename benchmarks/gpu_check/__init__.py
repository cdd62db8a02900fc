"""`make gpu-check`: whether this project does on a GPU what its tests say it does on the CPU, in under five minutes.

    python -m benchmarks.gpu_check                        on the GPU that is here
    python -m benchmarks.gpu_check --device cpu --tiny    to see that it runs

Every check is a function of a `Setting` that gives an `Outcome`, in a process and a time budget of its own: a kernel that
crashes, hangs or leaves the device unusable costs its own check only. Nothing is downloaded: models have random weights, the
text is a sample book. The results are one JSON and one page, benchmarks/results/gpu_check_<device>.json and .md.
"""
