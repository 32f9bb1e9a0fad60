# CUDA runtime, non-root; the same pyproject as everywhere. Build: docker build -t mmprefix .
#   docker run --gpus all --ipc=host -v "$PWD:/work" mmprefix fit --config configs/digits.yaml
# On several GPUs or nodes, /opt/mmprefix/scripts/torchrun.sh in the place of the entry point (docs/cluster.md).
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
# g++ and the Python headers are what torch.compile builds its kernels' launchers with.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/mmprefix
# Dependencies first: they change less often than the code, and are a layer of their own.
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src/mmprefix/__init__.py src/mmprefix/__init__.py
RUN pip install .
COPY src src
COPY configs configs
COPY scripts/torchrun.sh scripts/torchrun.sh
RUN pip install --no-deps --force-reinstall .

# ubuntu's images come with a user of this name, id 1000.
RUN mkdir -p /work && chown ubuntu:ubuntu /work
USER ubuntu
WORKDIR /work
RUN ln -s /opt/mmprefix/configs configs
ENTRYPOINT ["python", "-m", "mmprefix"]
CMD ["--help"]
