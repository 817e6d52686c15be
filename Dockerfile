# One node of a training run, for pretrain/launch/kubernetes.yaml: docker build -t moonlight:0.1.0 .
# torch of requirements/cuda.txt brings CUDA and NCCL with it; the driver is the host's, by the NVIDIA container toolkit.
# Without CUDA, for a trial: docker build --build-arg LOCK=cpu --build-arg INDEX=https://download.pytorch.org/whl/cpu .
FROM python:3.12-slim-bookworm
ARG LOCK=cuda
ARG INDEX=https://pypi.org/simple

# gcc: torch.compile builds its kernels when they are first used. The others: NCCL over InfiniBand.
# Debian keeps no older versions of a stable release, so pinned ones would be gone at the next update of theirs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ gcc ibverbs-providers libibverbs1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home moonlight

WORKDIR /moonlight
# Before the sources: a change of those leaves this layer, by far the largest, as it is.
COPY requirements/${LOCK}.txt requirements/
RUN pip install --no-cache-dir --extra-index-url "${INDEX}" -r requirements/${LOCK}.txt
COPY . .
# The processes write into runs/ and data/, which are volumes in a cluster; everything else stays root's.
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . \
    && mkdir -p runs data \
    && chown moonlight runs data

# A number, because Kubernetes must see that it is not root.
USER 1000
CMD ["moonlight", "--help"]
