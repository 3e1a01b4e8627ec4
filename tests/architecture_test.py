#!/usr/bin/env python3
"""Dependencies point one way: server -> engine -> kernels, calibrator -> engine, kernels."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
ALLOWED = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "calibrator": {"calibrator", "engine", "kernels"},
    "server": {"server", "engine", "kernels", "mobi"},
}
ROOMS = ALLOWED.keys() | {"mobi", "tests"}  # mobi/ is where generated protobuf headers live
FORBIDDEN = {  # what a room must not know, beyond the rooms above it
    "kernels": r"grpc|protobuf|yaml-cpp|prometheus|nlohmann",
    "engine": r"grpc|protobuf|yaml-cpp|prometheus|cuda_runtime|cublas",
    "calibrator": r"grpc|protobuf|prometheus|cuda_runtime",
    "server": r"cuda_runtime|cublas",
}
INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]')
failures, files = [], 0
for room, allowed in ALLOWED.items():
    for path in sorted((ROOT / room).rglob("*")):
        if path.suffix not in {".h", ".cc", ".cu", ".cuh"}:
            continue
        files += 1
        where = path.relative_to(ROOT)
        if len(where.parts) > 3:
            failures.append(f"{where}: deeper than two folders")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                continue
            bracket, name = match.groups()
            top = name.split("/")[0]
            if bracket == '"' and top in ROOMS and top not in allowed:
                failures.append(f"{where}:{number}: {room} may not include {name}")
            if re.search(FORBIDDEN[room], name):
                failures.append(f"{where}:{number}: {room} may not know {name}")
print("\n".join(failures) or f"{files} files point the right way")
sys.exit(1 if failures or not files else 0)
