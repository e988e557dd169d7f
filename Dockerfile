# An image for each kind of machine: docker build --target tpu --tag medmax:tpu .   (or cpu, cuda)
#
# The packages are the locked ones, compared with their hashes. Stages of their own install them to
# /venv, and the last stages copy only that: no compiler, build backend or cache is left.
# tests/programs/test_dockerfile.py executes the steps of a target without docker.

FROM python:3.12-slim AS build
ENV PIP_PYTHON=/venv/bin/python PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY requirements*.lock ./
# For the one package without a wheel, promise; removed after its use.
RUN python -m venv --without-pip /venv && \
    pip install --require-hashes -r requirements-build.lock

FROM build AS build-cpu
RUN pip install --require-hashes --no-build-isolation -r requirements.lock && \
    pip uninstall --yes setuptools

FROM build AS build-tpu
RUN pip install --require-hashes --no-build-isolation -r requirements-tpu.lock && \
    pip uninstall --yes setuptools

FROM build AS build-cuda
RUN pip install --require-hashes --no-build-isolation -r requirements-cuda.lock && \
    pip uninstall --yes setuptools

FROM python:3.12-slim AS base
LABEL org.opencontainers.image.source=https://github.com/medmax-jax/medmax_jax \
      org.opencontainers.image.licenses=Apache-2.0
ENV PATH=/venv/bin:$PATH PYTHONPATH=/app
WORKDIR /app
COPY . .
# The code belongs to root; the user may write to its home folder and to /app/runs.
RUN useradd --create-home --uid 1000 medmax && \
    install --directory --owner=medmax runs && \
    printf '#!/bin/sh\nexec python -m medmax_jax "$@"\n' > /usr/local/bin/medmax && \
    chmod +x /usr/local/bin/medmax && \
    python -m compileall -q configs data eval medmax_jax
USER 1000
ENTRYPOINT ["medmax"]
CMD ["--help"]

FROM base AS cpu
COPY --from=build-cpu /venv /venv

FROM base AS tpu
COPY --from=build-tpu /venv /venv

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /venv /venv
