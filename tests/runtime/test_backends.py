"""Tests runtime/backends: the table is whole, cheap to read, and says the true reason for a refusal."""

import ast
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tocom.runtime import backends
from tocom.runtime.backends import AUTO, BACKENDS, PRECISIONS, named, require, running
from tocom.runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_a_row_is_whole(backend):
    parts = backend.module.removeprefix("tocom.").split(".")
    module = ROOT.joinpath(*parts).with_suffix(".py")
    functions = {node.name for node in ast.parse(module.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert {"describe", "open_engine"} <= functions
    assert ("native_operators" in functions) == backend.has_native_operators
    assert backend.precisions[0] == "fp32" and set(backend.precisions) <= set(PRECISIONS)
    assert backend.typed or not backend.builds_plans
    assert backend.builds_plans or not backend.builds_without_device
    assert backend.float_rival is None or backend.float_rival in backend.precisions


def test_every_precision_is_run_by_somebody():
    assert all(running(precision) for precision in PRECISIONS)
    assert running("bf16") == ("openvino", "tensorrt", "tensorrt-rtx") and running("int2") == ()
    assert backends.precisions_in_words().startswith("fp32, fp16 (onnxruntime, tensorrt, tensorrt-rtx), bf16 (")


def test_versions_are_those_of_the_packages():
    assert BACKENDS["openvino"].version() == version("openvino")
    with pytest.raises(InputError, match="^backend tensorrt cannot run here, not installed: pip install tensorrt-"):
        BACKENDS["tensorrt"].version()


@pytest.mark.parametrize(
    ("backend", "precision", "message"),
    [
        ("openvino", "fp16", "precision must be one of fp32, bf16, int8 for openvino, got 'fp16': onnxruntime, "
                             "tensorrt, tensorrt-rtx run that"),
        ("onnxruntime", "int5", "precision must be one of fp32, fp16, int8 for onnxruntime, got 'int5'"),
        (AUTO, "fp8x", f"precision must be one of {', '.join(PRECISIONS)}, got 'fp8x'"),
        ("abacus", "fp32", f"backend must be auto or one of {', '.join(BACKENDS)}, got 'abacus'"),
    ],
)  # fmt: skip
def test_a_refusal_says_the_true_reason(backend, precision, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        require(backend, precision)


def test_what_goes_together_is_not_refused():
    for row in BACKENDS.values():
        for precision in row.precisions:
            require(row.name, precision)
    require(AUTO, "bf16")
    with pytest.raises(InputError, match=r"backend must be one of onnxruntime, .*, got auto"):
        named(AUTO)


def test_reading_the_table_imports_no_library():
    code = (
        "import sys\n"
        "heavy = ('numpy', 'PIL', 'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx')\n"
        "sys.modules.update(dict.fromkeys(heavy))\n"
        "from tocom.runtime.backends import require\n"
        "require('openvino', 'bf16')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
