# neuclip for CUDA GPUs. torch's wheels hold the CUDA libraries, so the host needs its driver alone.
#
#   docker build -t neuclip .
#   docker run --gpus all --ipc=host -v "$PWD:/work" neuclip train --help
#
# --ipc=host: data workers pass batches in shared memory, of which Docker gives 64 MB by default.
FROM python:3.11-slim-bookworm

# torch.compile builds its launchers with a C compiler.
RUN apt-get update && \
    apt-get install -y --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir --constraint constraints.txt ".[parquet,tensorboard,wandb]"

RUN useradd --create-home neuclip
USER neuclip
WORKDIR /work
ENTRYPOINT ["neuclip"]
CMD ["help"]
