# trl_spo on an NVIDIA GPU:
#
#     docker build --tag trl-spo .
#     docker run --rm --gpus all --volume "$PWD":/work trl-spo spo --config sd15 --dataset_name prompts.txt
#
# torch from the package index brings its own CUDA libraries; the base image has what lets a container use the driver.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

# On a GPU torch compiles the blocks that networks repeat, which takes a C compiler and Python's headers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/trl-spo
ENV PATH=/opt/trl-spo/bin:$PATH

# torch first, in a layer of its own: it is large and changes rarely.
WORKDIR /build
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt "$(grep '^torch==' constraints.txt)"

ARG EXTRAS=eval
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY trl_spo trl_spo
COPY examples/configs examples/configs
COPY examples/shapes examples/shapes
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]" && rm -rf build *.egg-info

# What a run writes belongs to a user without rights, in /work, where a folder of the host may be mounted.
RUN useradd --create-home --uid 1001 spo && install --directory --owner spo --group spo /work
USER spo
WORKDIR /work
ENTRYPOINT ["trl-spo"]
CMD ["--help"]
