# syntax=docker/dockerfile:1
# NVIDIA GPUs (driver 580 or later; CUDA comes with jax's packages), from the top of a clone:
#     docker build -f docker/cuda.Dockerfile -t imagereward-jax:cuda .
#     docker run --rm --gpus all -v "$PWD:/work" imagereward-jax:cuda train --config refl_tiny
# Runs, downloads and compiled programs are kept under /work if it is a volume that user 1000 can write to.
FROM python:3.12.11-slim-bookworm

ENV PYTHONUNBUFFERED=1
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN useradd --create-home --uid 1000 imagereward && install -d -o imagereward /work

COPY pyproject.toml setup.py README.md LICENSE /source/
COPY imagereward_jax /source/imagereward_jax
COPY configs /source/configs
COPY convert /source/convert
RUN --mount=type=cache,target=/root/.cache/pip pip install "/source[train,cuda13]"

USER 1000
ENV HF_HOME=/work/.cache/huggingface IMAGEREWARD_JAX_CACHE=/work/.cache/compiled
WORKDIR /work
ENTRYPOINT ["imagereward"]
CMD ["--help"]
