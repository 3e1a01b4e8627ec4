# The two commands of the README, and the rest: `make help`. Everything real is CMake's; this file
# only installs what is missing, picks a preset and calls it.
SHELL := /bin/bash
JOBS ?= $(shell nproc)
MODEL ?= deploy/demo/checkpoint
SERVE_FLAGS ?=
TEST_FLAGS ?=

.DEFAULT_GOAL := help

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

deps: ## Install the packages that are missing (Debian 12; asks sudo if not root)
	@deploy/setup-debian.sh

configure: deps
	@cmake --preset release >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }

build: configure ## Release build in build/release
	@cmake --build --preset release -j $(JOBS)

serve: configure ## Build the server and mobictl, then serve MODEL (the demo by default)
	@cmake --build --preset release -j $(JOBS) --target mobi-server mobictl
	@exec build/release/bin/mobi-server --model $(MODEL) $(SERVE_FLAGS)

test: build ## Build, then run every test; GPU tests skip where there is no GPU
	@ctest --test-dir build/release --output-on-failure -j $(JOBS) $(TEST_FLAGS)

bench: build ## Time decode steps and linears on the CPU, at four layers of Llama-3.2-1B
	@build/release/bin/mobi-bench step --layers 4
	@build/release/bin/mobi-bench linears --layers 4

asan tsan: deps ## Unit tests under AddressSanitizer + UBSan, or under ThreadSanitizer
	@cmake --preset $@ >build/configure-$@.log 2>&1 || { cat build/configure-$@.log; exit 1; }
	@cmake --build --preset $@ -j $(JOBS) --target unit_tests
	@ctest --test-dir build/$@ --output-on-failure -j $(JOBS) -L unit $(TEST_FLAGS)

sources = $(shell git ls-files '*.h' '*.cc' '*.cu' '*.cuh')

format: deps ## Format the sources in place
	@clang-format -i $(sources)

lint: build ## Format check and clang-tidy
	@clang-format --dry-run -Werror $(sources)
	@run-clang-tidy -quiet -p build/release -extra-arg=-Wno-unknown-warning-option '^$(CURDIR)/(kernels|engine|calibrator|server)/.*\.cc$$'

clean: ## Remove build/
	rm -rf build

.PHONY: help deps configure build serve test bench asan tsan format lint clean
