# A machine without CUDA on which `make quickstart` runs; for GPUs start from an image with CUDA and requirements/cuda.txt.
FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install --no-install-recommends -y git make && rm -rf /var/lib/apt/lists/*
WORKDIR /moonlight
COPY . .
RUN make install
CMD ["make", "quickstart"]
