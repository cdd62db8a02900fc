# Training on the GPUs of the machine:
#   docker build -t mulora-pipe .
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 -v /mnt/data:/mnt/data mulora-pipe \
#     deepspeed train.py --config /mnt/data/config.toml
# --ipc host: processes and NCCL share more memory than a container has by itself. torch from PyPI brings its CUDA libraries;
# the host has the driver. Without a GPU, an image of a quarter of the size:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu -t mulora-pipe .
FROM python:3.11-slim

# Triton compiles a launcher for each kernel; in a checkout that is mounted git says which commit a run came from; pdsh and ssh
# start runs on several hosts.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev git make openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mulora-pipe
COPY requirements.txt constraints.txt ./
# An index besides PyPI, which pip reads from its environment. Of one version it takes the one with a label: 2.13.0+cpu.
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY . .

CMD ["python", "doctor.py"]
