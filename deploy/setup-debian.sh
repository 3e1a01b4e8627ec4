#!/usr/bin/env bash
# Installs the Debian 12 packages that building, testing and serving need, and nothing when they are
# all there. CUDA is used when nvcc is found and is never installed from here.
set -euo pipefail
packages=(
  build-essential cmake ninja-build ccache pkg-config git ca-certificates
  libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libabsl-dev
  prometheus-cpp-dev libyaml-cpp-dev nlohmann-json3-dev libpcre2-dev libutf8proc-dev libhwy-dev
  libcurl4-openssl-dev libxxhash-dev libssl-dev libopenblas-dev liblapacke-dev
  libgtest-dev libgmock-dev libbenchmark-dev clang-format clang-tidy python3 tzdata
  python3-yaml python3-venv python3-grpcio python3-protobuf openssl golang-go golang-github-masterminds-sprig-dev
  golang-k8s-sigs-yaml-dev golang-github-gobwas-glob-dev
)
# Tests run these by themselves. Their packages start services, so they are left out, and the tests
# skip, where systemd runs.
[ -d /run/systemd/system ] || packages+=(prometheus nghttp2-proxy)
mkdir -p "$(dirname "$0")/../build"
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
echo "Installing: ${missing[*]}"
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
  "${missing[@]}" >/dev/null
