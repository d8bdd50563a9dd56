# prefpipe in a container, installed by make from the lock of a checkout. It has not been built by us: hadolint reads it,
# and tests check its files and its commands.
#   docker build --target cuda --tag prefpipe:cuda .    # or cpu
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume "$PWD:/work" prefpipe:cuda doctor
# The full image of Python has make, a C compiler and Python's headers: Triton compiles at run time.
FROM python:3.11-bookworm AS files
WORKDIR /prefpipe
COPY Makefile pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY prefpipe/__init__.py prefpipe/
ENV PATH="/prefpipe/.venv/bin:$PATH" HOME=/tmp

# The code comes behind the packages: a change of it installs nothing again.
FROM files AS cpu
RUN make setup LOCK=cpu
COPY prefpipe prefpipe
COPY stages stages
COPY data data
WORKDIR /work
ENTRYPOINT ["prefpipe"]

FROM files AS cuda
RUN make setup LOCK=cuda
COPY prefpipe prefpipe
COPY stages stages
COPY data data
WORKDIR /work
ENTRYPOINT ["prefpipe"]
