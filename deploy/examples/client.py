#!/usr/bin/env python3
"""A MoBiServe client in Python: streams a completion and tells what it cost.

    apt install python3-grpcio python3-protobuf protobuf-compiler protobuf-compiler-grpc
    deploy/examples/client.py "Once upon a time" --max-new-tokens 64 --min-bits 4

The stubs are made from proto/ when the program starts; an application would make them once.
"""
import argparse
import importlib
import pathlib
import shutil
import subprocess
import sys
import tempfile

import grpc

PROTO = pathlib.Path(__file__).resolve().parent.parent.parent / "proto"


def load_stubs(folder):
    """Generates and imports mobi.v1.inference: (messages, services)."""
    subprocess.run(
        ["protoc", f"-I{PROTO}", f"--python_out={folder}", f"--grpc_python_out={folder}",
         f"--plugin=protoc-gen-grpc_python={shutil.which('grpc_python_plugin')}",
         str(PROTO / "mobi/v1/inference.proto")], check=True)
    sys.path.insert(0, str(folder))
    return (importlib.import_module("mobi.v1.inference_pb2"),
            importlib.import_module("mobi.v1.inference_pb2_grpc"))


def build_request(pb, options):
    request = pb.GenerateRequest(text=options.prompt)
    if options.max_new_tokens is not None:
        request.max_new_tokens = options.max_new_tokens
    if options.temperature is not None:
        request.sampling.temperature = options.temperature
    if options.min_bits is not None:
        request.precision.min_bits = options.min_bits
    return request


def open_channel(options):
    if options.tls_ca is None:
        return grpc.insecure_channel(options.server)
    authority = pathlib.Path(options.tls_ca).read_bytes()
    return grpc.secure_channel(options.server, grpc.ssl_channel_credentials(authority))


def metadata_of(options):
    if options.token_file is None:
        return ()
    token = pathlib.Path(options.token_file).read_text().strip()
    return (("authorization", f"Bearer {token}"),)


def stream(stub, request, options):
    """Prints text as it comes; returns the summary."""
    summary = None
    for message in stub.Generate(request, timeout=options.timeout, metadata=metadata_of(options)):
        for chunk in message.chunks:
            print(chunk.text, end="", flush=True)
        if message.HasField("summary"):
            summary = message.summary
    print()
    return summary


def main():
    parser = argparse.ArgumentParser(description="Streams a completion.")
    parser.add_argument("prompt")
    parser.add_argument("--server", default="127.0.0.1:50051")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--min-bits", type=float, help="fewest average bits to accept")
    parser.add_argument("--tls-ca", help="PEM file of the server's authority; turns TLS on")
    parser.add_argument("--token-file", help="file that holds the bearer token")
    parser.add_argument("--timeout", type=float, default=120, help="seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open_channel(options) as channel:
        pb, services = load_stubs(folder)
        stub = services.InferenceStub(channel)
        try:
            summary = stream(stub, build_request(pb, options), options)
        except grpc.RpcError as error:
            # RESOURCE_EXHAUSTED and UNAVAILABLE may be tried again; a google.rpc.RetryInfo in the
            # trailer grpc-status-details-bin says when.
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    usage = summary.usage
    print(f"{usage.prompt_tokens} + {usage.completion_tokens} tokens in "
          f"{summary.timings.total_ms:.0f} ms at {summary.mean_effective_bits:.2f} bits",
          file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
