# Image of one node of a training run, for pretrain/launch/kubernetes.yaml: docker build -t moonlight:0.1.0 .
# torch in requirements/cuda.txt includes CUDA and NCCL; the NVIDIA Container Toolkit provides the driver of the host.
# To try it without CUDA: docker build --build-arg LOCK=cpu --build-arg INDEX=https://download.pytorch.org/whl/cpu .
FROM python:3.12-slim-bookworm
ARG LOCK=cuda
ARG INDEX=https://pypi.org/simple

# torch.compile needs gcc to build kernels at first use. NCCL over InfiniBand needs the other packages.
# Versions are not pinned: Debian removes the old version when it updates a package of a stable release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ gcc ibverbs-providers libibverbs1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home moonlight

WORKDIR /moonlight
# Before the sources, so that a change of the sources does not rebuild this layer, which is by far the largest.
COPY requirements/${LOCK}.txt requirements/
RUN pip install --no-cache-dir --extra-index-url "${INDEX}" -r requirements/${LOCK}.txt
COPY . .
# The processes write to runs/ and data/, which are volumes in a cluster; root owns all other files.
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . \
    && mkdir -p runs data \
    && chown moonlight runs data

# A numeric id, so that Kubernetes can check that the user is not root.
USER 1000
CMD ["moonlight", "--help"]
