#!/usr/bin/python3
"""How long a server takes from start to ready with a large checkpoint, beside reading the same files:
a folder of Llama-3-8B's shape, of random slices under true checksums, is written once, and then loaded
from the disk (its pages dropped from the cache first), past the page cache and through it, and from the
page cache. The floor is a program that does nothing but read the files, past the page cache, into fresh
memory as weights take it: huge pages, on all cores. A virtual machine may be given memory by its host
page by page, which can cost more than all else, so the floor is measured beside every start.

usage: cold_start.py BIN_DIR WORK_DIR [LAYERS [ROUNDS [FLAG_OF_THE_SERVER...]]]

32 layers take 10 GB of disk and as much memory. WORK_DIR keeps the folder; delete it afterwards.
"""
import concurrent.futures
import hashlib
import json
import mmap
import os
import pathlib
import random
import shutil
import statistics
import struct
import sys
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
from server_process import DEMO, Server  # noqa: E402

SHARD_BYTES = 4 << 30
CHUNK = 4 << 20
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "head_dim": 128,
         "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
         "rope_theta": 500000.0, "tie_word_embeddings": False}
TILE_ROWS, GROUP, ROUTER_HIDDEN = 16, 128, 32


def linear(name, rows, cols):
    tiles = [rows // TILE_ROWS, cols // GROUP]
    for i in range(4):
        yield f"{name}.slice_{i}", "U8", tiles + [512]
    for i in range(1, 5):
        yield f"{name}.scales_{i}", "F16", tiles + [TILE_ROWS, 2]


def router(name, segments, cols):
    yield f"{name}.w1", "F16", [ROUTER_HIDDEN, cols]
    yield f"{name}.b1", "F32", [ROUTER_HIDDEN]
    yield f"{name}.u", "F32", [ROUTER_HIDDEN]
    yield f"{name}.w2", "F32", [4 * segments, ROUTER_HIDDEN]
    yield f"{name}.b2", "F32", [4 * segments]


def tensors(layers):
    """(name, type, shape), in the order that the calibrator writes them."""
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    key_value = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    yield "model.embed_tokens.weight", "BF16", [SHAPE["vocab_size"], hidden]
    yield "lm_head.weight", "BF16", [SHAPE["vocab_size"], hidden]
    yield "model.norm.weight", "BF16", [hidden]
    for i in range(layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", "BF16", [hidden]
        yield f"{layer}.post_attention_layernorm.weight", "BF16", [hidden]
        for group, outputs, cols in (
                ("self_attn.qkv_router", {"self_attn.q_proj": hidden, "self_attn.k_proj": key_value,
                                          "self_attn.v_proj": key_value}, hidden),
                ("self_attn.o_router", {"self_attn.o_proj": hidden}, hidden),
                ("mlp.gate_up_router", {"mlp.gate_proj": inner, "mlp.up_proj": inner}, hidden),
                ("mlp.down_router", {"mlp.down_proj": hidden}, inner)):
            for name, rows in outputs.items():
                yield from linear(f"{layer}.{name}", rows, cols)
            yield from router(f"{layer}.{group}", len(outputs), cols)


def size_of(dtype, shape):
    size = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}[dtype]
    for n in shape:
        size *= n
    return size


def shards(layers):
    found, used = [[]], 0
    for tensor in tensors(layers):
        size = size_of(tensor[1], tensor[2])
        if used + size > SHARD_BYTES:
            found.append([])
            used = 0
        found[-1].append(tensor)
        used += size
    return found


def content():
    """{type: bytes to repeat}: random codes, and floats that are small and finite."""
    source = random.Random(1)
    small = struct.pack("<H", 0x2000)  # 2^-7 as fp16, a tiny bf16
    return {"U8": source.randbytes(CHUNK), "F16": small * (CHUNK // 2), "BF16": small * (CHUNK // 2),
            "F32": struct.pack("<f", 0.01) * (CHUNK // 4)}


def write_shard(path, shard, data):
    """Returns its SHA-256."""
    header, at = {}, 0
    for name, dtype, shape in shard:
        size = size_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        def write(piece):
            file.write(piece)
            digest.update(piece)
        write(struct.pack("<Q", len(text)) + text)
        for _, dtype, shape in shard:
            left = size_of(dtype, shape)
            while left > 0:
                write(memoryview(data[dtype])[:left])
                left -= min(left, CHUNK)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def make_checkpoint(folder, layers):
    folder.mkdir(parents=True)
    data, digests, index = content(), {}, {}
    found = shards(layers)
    for i, shard in enumerate(found):
        name = f"model-{i + 1:05}-of-{len(found):05}.safetensors"
        digests[name] = write_shard(folder / name, shard, data)
        index.update({tensor[0]: name for tensor in shard})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": sum(size_of(*t[1:]) for s in found for t in s)},
                    "weight_map": index}))
    config = json.loads((DEMO / "config.json").read_text())
    config.update(SHAPE, num_hidden_layers=layers)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json",
                 "special_tokens_map.json"):
        shutil.copy(DEMO / name, folder / name)
    for path in folder.iterdir():
        if path.name not in digests:
            digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "MANIFEST").write_text(
        "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))


def drop_pages(folder):
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def floor_seconds(folder):
    start = time.monotonic()
    pieces, memory = [], []
    for path in sorted(folder.glob("*.safetensors")):
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        memory.append(mmap.mmap(-1, path.stat().st_size + 2 * CHUNK))
        memory[-1].madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(memory[-1])
        pieces += [(file, view[at:at + CHUNK], at) for at in range(0, path.stat().st_size, CHUNK)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() + 4) as threads:
        read = sum(threads.map(lambda piece: os.preadv(piece[0], [piece[1]], piece[2]), pieces))
    seconds = time.monotonic() - start
    assert read == sum(path.stat().st_size for path in folder.glob("*.safetensors")), read
    for file in {piece[0] for piece in pieces}:
        os.close(file)
    return seconds


def start_seconds(bin_dir, folder, *flags):
    with Server(bin_dir, "--max_model_len", "1024", *flags, model=folder) as server:
        lines = sum(line.startswith("loading") for line in server.greeting.splitlines())
        return server.seconds_to_ready, server.cpu_seconds(), lines


def main():
    bin_dir, folder = sys.argv[1], pathlib.Path(sys.argv[2]) / "llama-3-8b-shape"
    layers = int(sys.argv[3]) if len(sys.argv) > 3 else 32
    rounds = int(sys.argv[4]) if len(sys.argv) > 4 else 3
    if not (folder / "MANIFEST").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_checkpoint(folder, layers)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{size / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} files", flush=True)
    for where, cold, flags in (("from the disk, past the page cache", True, ["--direct_io"]),
                               ("from the disk", True, []),
                               ("from the page cache", False, [])):
        floor, ready, cpu = [], [], []
        for _ in range(rounds):
            floor.append(floor_seconds(folder))
            if cold:
                drop_pages(folder)
            seconds, used, lines = start_seconds(bin_dir, folder, *flags, *sys.argv[5:])
            ready.append(seconds)
            cpu.append(used)
        print(f"{where}: floor {statistics.median(floor):.1f} s ({min(floor):.1f} to {max(floor):.1f}), "
              f"start to ready {statistics.median(ready):.1f} s ({min(ready):.1f} to {max(ready):.1f}), "
              f"{statistics.median(cpu):.1f} s of CPU, {lines} lines of progress", flush=True)


main()
