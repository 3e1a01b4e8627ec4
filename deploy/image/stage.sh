#!/usr/bin/env bash
# What the stages of the Dockerfile run, apart from it so that it can be run, timed and debugged in
# any Debian 12 or Ubuntu 24.04 root without a container engine.
#
#   stage.sh build-packages   compilers and libraries to build with
#   stage.sh grpc VERSION     gRPC from source into /opt/grpc; VERSION "": nothing
#   stage.sh build            /src into /out: programs, and the packages that they need
#   stage.sh runtime          those packages and the user, from /out/packages
set -euo pipefail

apt_install() {
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
  apt-get clean
  rm -rf /var/lib/apt/lists/*
}

build_packages() {
  apt_install build-essential cmake ninja-build pkg-config git ca-certificates \
    libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libabsl-dev \
    prometheus-cpp-dev libyaml-cpp-dev nlohmann-json3-dev libpcre2-dev libutf8proc-dev libhwy-dev \
    libcurl4-openssl-dev libxxhash-dev libssl-dev libopenblas-dev liblapacke-dev
}

# With the abseil and protobuf of its own release, linked statically. The distribution's headers of
# the three go, so that no file is compiled against a mixture.
grpc() {
  local version=$1 source=/tmp/grpc
  [ -n "$version" ] || return 0
  git clone -q --depth 1 --branch "v$version" --recurse-submodules --shallow-submodules \
    https://github.com/grpc/grpc "$source"
  cmake -S "$source" -B "$source/out" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_STANDARD=20 \
    -DCMAKE_INSTALL_PREFIX=/opt/grpc -DABSL_PROPAGATE_CXX_STD=ON -DgRPC_INSTALL=ON \
    -DgRPC_BUILD_TESTS=OFF -DgRPC_SSL_PROVIDER=package -DgRPC_ZLIB_PROVIDER=package
  cmake --build "$source/out" --target install
  rm -rf "$source"
  apt-get remove -y -qq libgrpc++-dev libgrpc-dev libprotobuf-dev libabsl-dev \
    protobuf-compiler-grpc protobuf-compiler
}

# Warnings are no errors here: gRPC releases and compilers that the project is not developed with may
# have more of them (gRPC 1.76 calls deprecated what 1.51 has nothing else for).
build() {
  cmake -S /src -B /tmp/build -G Ninja -DCMAKE_BUILD_TYPE=Release -DMOBI_TESTS=OFF -DMOBI_WERROR=OFF \
    -DMOBI_CUDA="${MOBI_CUDA:-OFF}" -DCMAKE_PREFIX_PATH=/opt/grpc \
    -DCMAKE_FIND_PACKAGE_PREFER_CONFIG="$([ -d /opt/grpc ] && echo ON || echo OFF)"
  local programs=(mobi-server mobictl mobi-inspect)
  cmake --build /tmp/build --target "${programs[@]}"
  mkdir -p /out/bin
  local program
  for program in "${programs[@]}"; do strip -o "/out/bin/$program" "/tmp/build/bin/$program"; done
  needed_packages /out/bin/* >/out/packages
}

# The packages that own the shared libraries of programs, whatever this distribution calls them.
needed_packages() {
  ldd "$@" | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u | while read -r library; do
    dpkg-query -S "$library" 2>/dev/null || dpkg-query -S "$(realpath "$library")"
  done | cut -d: -f1 | sort -u
}

runtime() {
  local packages
  mapfile -t packages </out/packages
  apt_install ca-certificates tzdata "${packages[@]}"
  rm -rf /var/cache/debconf/* /var/log/apt /var/log/dpkg.log
  echo 'mobi:x:65532:65532::/nonexistent:/usr/sbin/nologin' >>/etc/passwd
  echo 'mobi:x:65532:' >>/etc/group
}

case "${1:-}" in
  build-packages) build_packages ;;
  grpc) grpc "${2:-}" ;;
  build) build ;;
  runtime) runtime ;;
  *) sed -n '2,9p' "$0" >&2; exit 2 ;;
esac
