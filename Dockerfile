# Two targets: `docker build --target cpu .` and `docker build --target cuda .`
# Installs what CI installs: hashed locks, no dependency resolution, then our wheel.
# To run it, see "Install" in docs/operations.md. The database and the state directory are kept in /state.

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN pip install --no-cache-dir setuptools==78.1.1 wheel==0.48.0
COPY pyproject.toml README.md LICENSE ./
COPY policies policies
COPY kernels kernels
COPY experts experts
COPY server server
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.11-slim-bookworm AS base
# gcc builds the routing step for CPU at first use; without it NumPy does the same, slower.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 flexgate && mkdir /state && chown flexgate /state
ENV PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 FLEXGATE_STATE_DIR=/state
COPY locks /locks
COPY --from=build /wheels /wheels

FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m pip install --no-cache-dir --no-deps --require-hashes --extra-index-url "$TORCH_INDEX" -r locks/cpu.txt -r locks/torch-cpu.txt
RUN python -m pip install --no-cache-dir --no-deps /wheels/*.whl
USER flexgate
WORKDIR /state
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["flexgate"]

FROM base AS cuda
# Unverified: no GPU was at hand. vLLM's own requirements are resolved here, not locked.
RUN wheel=$(echo /wheels/*.whl) && python -m pip install --no-cache-dir "flexgate[cuda] @ file://$wheel"
USER flexgate
WORKDIR /state
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=600s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["flexgate"]
