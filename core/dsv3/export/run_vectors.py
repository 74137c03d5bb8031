"""Run test vectors under a stock runtime: `python -m dsv3.export.run_vectors VECTORS OUTPUTS --runtime onnxruntime`.

It writes OUTPUTS/<op>/<case>/output_<i>.pb for `dsv3.export.compare`: the body of every operator, proven end to end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsv3.errors import Dsv3Error, UsageError
from dsv3.export.compare import cases
from dsv3.export.packages import onnx
from dsv3.export.runtime import RUNTIMES, runtime


def run_vectors(vectors: Path, outputs: Path, name: str) -> int:
    """Run all vectors of a folder and write their outputs; returns how many. UsageError if there are none."""
    run, count = runtime(name), 0
    for vector in cases(vectors):
        run_vector(vector, outputs / vector.relative_to(vectors), run)
        count += 1
    if not count:
        raise UsageError(f"{vectors} holds no vectors (no */*/budget.json); `dsv3 conformance export` writes them")
    return count


def run_vector(vector: Path, into: Path, run: object) -> None:
    """Run one vector by `run(model, inputs)` and write its outputs."""
    package = onnx()
    model = package.load(str(vector / "model.onnx"))
    files = [vector / "test_data_set_0" / f"input_{i}.pb" for i in range(len(model.graph.input))]
    tensors = [package.load_tensor(str(file)) for file in files]
    found = run(model, {t.name: package.numpy_helper.to_array(t) for t in tensors})  # type: ignore[operator]
    into.mkdir(parents=True, exist_ok=True)
    for i, (name, array) in enumerate(found.items()):
        (into / f"output_{i}.pb").write_bytes(package.numpy_helper.from_array(array, name).SerializeToString())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m dsv3.export.run_vectors", description="Run vectors under a stock runtime.")
    parser.add_argument("vectors", type=Path)
    parser.add_argument("outputs", type=Path)
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), default="onnxruntime")
    parsed = parser.parse_args(arguments)
    try:
        count = run_vectors(parsed.vectors, parsed.outputs, parsed.runtime)
    except Dsv3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{count} vectors run by {parsed.runtime}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
