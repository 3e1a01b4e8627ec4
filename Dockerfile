# Two images: docker build --target cpu -t mobiserve:cpu .   and   --target cuda -t mobiserve:cuda .
# The commands are in deploy/image/stage.sh; deploy/README.md says how to run the images.
ARG CPU_BASE=debian:bookworm-slim
ARG CUDA_BUILD_BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG CUDA_BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

# What the programs are built from, and nothing else: a change of tests or docs builds no image anew.
FROM scratch AS source
COPY CMakeLists.txt /
COPY proto /proto
COPY kernels /kernels
COPY engine /engine
COPY calibrator /calibrator
COPY server /server

FROM ${CPU_BASE} AS build-cpu
COPY deploy/image/stage.sh /stage.sh
RUN /stage.sh build-packages
# A gRPC release such as 1.76.0 from source; empty: the distribution's.
ARG GRPC_VERSION=""
RUN /stage.sh grpc "${GRPC_VERSION}"
COPY --from=source / /src/
RUN /stage.sh build

FROM ${CUDA_BUILD_BASE} AS build-cuda
COPY deploy/image/stage.sh /stage.sh
RUN /stage.sh build-packages
ARG GRPC_VERSION=""
RUN /stage.sh grpc "${GRPC_VERSION}"
COPY --from=source / /src/
# Empty: every card that the project supports; "90a-real" builds for H100 and H200 alone.
ARG CUDAARCHS=""
RUN [ -n "${CUDAARCHS}" ] || unset CUDAARCHS; MOBI_CUDA=ON /stage.sh build

FROM ${CPU_BASE} AS cpu
RUN --mount=type=bind,from=build-cpu,source=/out,target=/out \
    --mount=type=bind,from=build-cpu,source=/stage.sh,target=/stage.sh /stage.sh runtime
COPY --from=build-cpu /out/bin/ /usr/local/bin/
COPY deploy/demo/checkpoint /usr/share/mobiserve/demo
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="MoBiServe" \
      org.opencontainers.image.description="gRPC inference with elastic precision, on the CPU" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim"
USER 65532:65532
EXPOSE 50051 50052 9400
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=4s --start-period=10m --retries=3 \
  CMD ["mobictl", "health", "mobi.v1.Inference", "--timeout_s", "3"]
ENTRYPOINT ["mobi-server"]
CMD ["--model", "/usr/share/mobiserve/demo"]

FROM ${CUDA_BASE} AS cuda
RUN --mount=type=bind,from=build-cuda,source=/out,target=/out \
    --mount=type=bind,from=build-cuda,source=/stage.sh,target=/stage.sh /stage.sh runtime
COPY --from=build-cuda /out/bin/ /usr/local/bin/
COPY deploy/demo/checkpoint /usr/share/mobiserve/demo
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="MoBiServe" \
      org.opencontainers.image.description="gRPC inference with elastic precision, on NVIDIA GPUs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04"
ENV MOBI_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
EXPOSE 50051 50052 9400
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=4s --start-period=10m --retries=3 \
  CMD ["mobictl", "health", "mobi.v1.Inference", "--timeout_s", "3"]
ENTRYPOINT ["mobi-server"]
CMD ["--model", "/usr/share/mobiserve/demo"]

# The proxy for clients that are not trusted: deploy/nghttpx.conf, and the chart's front.
FROM ${CPU_BASE} AS front
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nghttp2-proxy \
 && apt-get clean && rm -rf /var/lib/apt/lists/*
USER 65532:65532
EXPOSE 8443
STOPSIGNAL SIGQUIT
ENTRYPOINT ["nghttpx"]
CMD ["--conf=/etc/nghttpx/nghttpx.conf"]
