# Alloy with its pipeline: servers and workers of pools are commands of this one image. The clone
# in it is a worker's own: it fetches the commit of each stage. docs/placement.md
#   docker build --tag alloy .
#   docker build --tag alloy:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# As in the Makefile; an index or a folder of wheels of your own goes into the other two.
ARG UV_VERSION=0.13.9
ARG UV_DEFAULT_INDEX=""
ARG UV_FIND_LINKS=""

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update; \
    apt-get install --yes --no-install-recommends ca-certificates git make openssh-client; \
    command -v python3 || apt-get install --yes --no-install-recommends python3 python3-venv; \
    rm -rf /var/lib/apt/lists/*; \
    git config --system --add safe.directory '*'; \
    useradd --create-home alloy; \
    install --directory --owner=alloy /alloy
USER alloy
WORKDIR /alloy

# The packages before the code: a commit that changes none of them builds in seconds.
COPY --chown=alloy requirements.lock requirements.overrides ./
RUN python3 -m venv .venv; \
    .venv/bin/python -m pip install --quiet --no-cache-dir "uv==${UV_VERSION}"; \
    for name in UV_DEFAULT_INDEX UV_FIND_LINKS; do [ -n "${!name}" ] || unset "$name"; done; \
    .venv/bin/uv pip install --quiet --no-cache --python .venv/bin/python \
      --override requirements.overrides --requirements requirements.lock

COPY --chown=alloy . .
RUN for name in UV_DEFAULT_INDEX UV_FIND_LINKS; do [ -n "${!name}" ] || unset "$name"; done; \
    .ci/venv .venv "${UV_VERSION}"; \
    .ci/repository; \
    touch .venv/.ready; \
    mkdir -p .dvc/cache .prefect

ENV PATH=/alloy/.venv/bin:$PATH \
    PYTHONPATH=/alloy \
    ALLOY_WORKSPACE=/alloy \
    PREFECT_HOME=/alloy/.prefect \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["make", "help"]
